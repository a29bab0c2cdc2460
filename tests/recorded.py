"""Recorded groups, made by hand, at random or by really sampling from a policy; and a log that holds them.

group([response([5, 6], reward=1.0), response([7], reward=0.0)])      by hand
random_group(draw=3, policy_step=2)                                   plausible numbers, decided by the draw
sampled_group(policy, "1+2+3=", size=8)                               age 0: log-probs are the policy's own
RecordedLog([encode(each) for each in groups])                        what sapo_learner.train.train reads
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from sapo_learner.archive import GENESIS, Entry, link
from sapo_learner.config import LearnerSettings
from sapo_learner.control import encode_settings
from sapo_learner.policy import Policy
from sapo_learner.trajectory import SamplingParameters, Trajectory, TrajectoryGroup, VersionSpan

ALPHABET = "0123456789+-=()>"  # of the demonstration's task
VOCABULARY = 3 + len(ALPHABET)  # of a tiny policy over it


def response(
    token_ids: Sequence[int],
    *,
    reward: float = 0.0,
    logprobs: Sequence[float] | None = None,
    mask: Sequence[bool] | None = None,
    steps: Sequence[int] | int = 0,
    finish_reason: Any = "stop",
) -> Trajectory:
    """One response; log-probs default to a uniform policy's. steps: the policy's optimizer step, per token or for all;
    versions carry the same numbers."""
    count = len(token_ids)
    sampled = np.ones(count, np.bool_) if mask is None else np.array(mask, np.bool_)
    values = np.full(count, -math.log(VOCABULARY)) if logprobs is None else np.array(logprobs)
    per_token = [steps] * count if isinstance(steps, int) else list(steps)
    return Trajectory(
        token_ids=np.array(token_ids, np.int32),
        behaviour_logprobs=np.where(sampled, values, 0.0).astype(np.float32),
        loss_mask=sampled,
        spans=tuple(VersionSpan(1, step, step) for step in per_token),
        rewards={"correct": reward},
        finish_reason=finish_reason,
    )


def group(
    responses: Sequence[Trajectory], *, draw: int = 0, prompt_ids: Sequence[int] = (4, 13, 5), temperature: float = 1.0
) -> TrajectoryGroup:
    return TrajectoryGroup(
        draw=draw,
        attempt=1,
        task="arithmetic",
        prompt_id=f"prompt-{draw}",
        epoch=0,
        seed=draw,
        prompt_ids=np.array(prompt_ids, np.int32),
        trajectories=tuple(responses),
        sampling=SamplingParameters(temperature=temperature, max_tokens=64),
        engine="recorded",
    )


def random_group(draw: int, *, size: int = 4, policy_step: int = 0, spread: float = 0.3) -> TrajectoryGroup:
    """Prompt and responses of random ids and lengths, behaviour log-probs near a fresh policy's, about a fifth of the
    tokens masked, and rewards that are not all equal (the first is 1, the last 0)."""
    random = np.random.default_rng(draw)

    def one(reward: float) -> Trajectory:
        count = int(random.integers(1, 9))
        return response(
            random.integers(3, VOCABULARY, count).tolist(),
            reward=reward,
            logprobs=np.minimum(-math.log(VOCABULARY) + spread * random.standard_normal(count), 0.0).tolist(),
            mask=[True, *(random.random(count - 1) > 0.2).tolist()],
            steps=policy_step,
        )

    rewards = [1.0, *random.integers(0, 2, size - 2).astype(float).tolist(), 0.0]
    prompt_ids = random.integers(3, VOCABULARY, int(random.integers(1, 6))).tolist()
    return group([one(reward) for reward in rewards], draw=draw, prompt_ids=prompt_ids)


def degenerate_group(draw: int, *, policy_step: int = 0) -> TrajectoryGroup:
    """All rewards equal: no signal."""
    return group([response([5, 6, 1], reward=1.0, steps=policy_step) for _ in range(2)], draw=draw)


@torch.no_grad()
def sampled_group(
    policy: Policy,
    prompt: str,
    *,
    size: int,
    draw: int = 0,
    max_tokens: int = 8,
    temperature: float = 1.0,
    policy_step: int = 0,
    reward: Callable[[str], float] = lambda text: float(len(text) % 2),
) -> TrajectoryGroup:
    """Sample as an engine would, one token at a time, and record the log-probs that were sampled from."""
    generator = torch.Generator().manual_seed(draw)
    prompt_ids = policy.tokenizer.encode(prompt)
    ids = torch.tensor([prompt_ids] * size)
    logprobs = torch.zeros(size, 0)
    for _ in range(max_tokens):
        distribution = (policy.model(input_ids=ids).logits[:, -1].float() / temperature).log_softmax(-1)
        chosen = torch.multinomial(distribution.exp(), 1, generator=generator)
        ids = torch.cat([ids, chosen], 1)
        logprobs = torch.cat([logprobs, distribution.gather(1, chosen)], 1)
    responses = []
    for row, values in zip(ids[:, len(prompt_ids) :].tolist(), logprobs.tolist(), strict=True):
        ended = next((index for index, token in enumerate(row) if token in policy.end_ids), None)
        length = max_tokens if ended is None else ended + 1
        responses.append(
            response(
                row[:length],
                reward=reward(policy.tokenizer.decode(row[:length], skip_special_tokens=True)),
                logprobs=values[:length],
                steps=policy_step,
                finish_reason="length" if ended is None else "stop",
            )
        )
    return group(responses, draw=draw, prompt_ids=prompt_ids, temperature=temperature)


def entries(payloads: Sequence[bytes | LearnerSettings]) -> list[Entry]:
    """The log that holds these payloads, from sequence 1 on, properly chained; settings become a `config` entry."""
    chain, log, draw = GENESIS, [], 0
    for sequence, content in enumerate(payloads, start=1):
        kind, payload = ("group", content) if isinstance(content, bytes) else ("config", encode_settings(content))
        chain = link(chain, f"1-{sequence}", kind, hashlib.sha256(payload).hexdigest())
        log.append(Entry(1, sequence, kind, draw if kind == "group" else -1, chain, payload))
        draw += kind == "group"
    return log


class RecordedLog:
    """sapo_learner.train.Log over a list; says stop where it ends. `asked` is every (after, count) so far."""

    def __init__(self, payloads: Sequence[bytes | LearnerSettings]) -> None:
        self.entries = entries(payloads)
        self.asked: list[tuple[int, int]] = []

    def next(self, after: int, count: int) -> list[Entry] | None:
        self.asked.append((after, count))
        found = self.entries[after : after + count]
        return found if len(found) == count else None

    def controls(self, after: int, *, anywhere: bool = False) -> list[Entry]:
        entries = self.entries[after:]
        if anywhere:
            return [entry for entry in entries if entry.kind != "group"]
        return list(takewhile(lambda entry: entry.kind != "group", entries))
