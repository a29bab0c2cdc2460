"""The probe (I4): one fixed token sequence that learner and engine both score, for every version that is published.

    learner   draw_sequence, once per run; measure, for every published version; the numbers travel in its manifest
    worker    scores the same sequence after every weight sync; compare says whether engine and learner mean the same

Log-probs are the model's own, at temperature 1: all that every engine can tell of tokens that it did not sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapo_learner.errors import Corrupt
from sapo_learner.logprobs import token_logprobs
from sapo_learner.manifest import Probe
from sapo_learner.packing import Packing
from sapo_learner.policy import Policy
from sapo_learner.sharding import ShardedPolicy

LENGTH = 64  # tokens: enough for a mean that says something, and one small forward pass per version

MAX_FLOAT32 = 1e-4
"""Nats, at every token. Two ways to compute the same float32 policy differ by some 1e-6 (vLLM and transformers:
4e-6 at most); a cache or a tensor of another version differs by 1 and more."""
MEAN_SIXTEEN_BIT = 0.05
"""Nats, over the sequence. bfloat16 alone makes 0.01 to 0.02; single tokens are off by 0.2 and more where a mixture of
experts routes them otherwise, so the maximum is reported and bounds nothing."""


def draw_sequence(policy: Policy, *, seed: int, context: int | None = None) -> list[int]:
    """Ids of the run's probe: ordinary tokens, the same for the same seed and tokenizer; the first is the prompt.

    context: most tokens that an engine takes; one of them is left free for the token that some engines sample behind
    whatever they score.
    """
    limits = [each for each in (context, policy.context) if each is not None]
    length = max(2, min(LENGTH, *(limit - 1 for limit in limits)) if limits else LENGTH)
    tokenizer = policy.tokenizer
    odd = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values(), *policy.end_ids}
    known = range(min(policy.vocabulary, len(tokenizer)))  # embeddings are often padded to more rows
    ordinary = [each for each in known if each not in odd] or list(known)
    generator = np.random.default_rng(np.random.SeedSequence([seed, LENGTH]))
    return [ordinary[index] for index in generator.integers(len(ordinary), size=length)]


def sequence_logprobs(
    policy: Policy, prompt_ids: Sequence[int], token_ids: Sequence[int], temperature: float = 1.0
) -> NDArray[np.float32]:
    """Log-probs of `token_ids` after `prompt_ids`, in nats, as the learner computes them: one plain forward pass."""
    ids = torch.tensor([[*prompt_ids, *token_ids]], device=policy.head_weight.device)
    with torch.no_grad():
        hidden = policy.hidden(ids, torch.ones_like(ids, dtype=torch.bool))[0, len(prompt_ids) - 1 : -1]
        logprobs, _ = token_logprobs(
            hidden, policy.head_weight, ids[0, len(prompt_ids) :],
            temperature=temperature, bias=policy.head_bias, with_entropy=False,
        )  # fmt: skip
    values: NDArray[np.float32] = logprobs.cpu().numpy()
    return values


def measure(policy: Policy, tensors: Mapping[str, Tensor], sequence: Sequence[int]) -> Probe:
    """What the learner makes of the sequence with these weights in place of the policy's, which are left alone.

    tensors: as they are published, so rounded to the inference dtype, but held in the learner's, in which everything is
    computed here. A 16-bit engine therefore differs by its arithmetic and by nothing else.

    Raises Corrupt when a log-prob is not finite: such weights are never published.
    """
    with policy.standing_in(tensors) as stand_ins:
        weights = {f"_model.{name}": tensor for name, tensor in stand_ins.items()}
        logprobs = torch.func.functional_call(_Scoring(policy), weights, (sequence,))
    return _probe(sequence, logprobs)


def measure_sharded(policy: ShardedPolicy, dtype: str, sequence: Sequence[int]) -> Probe:
    """The same of a sharded policy as it is published in `dtype`, on all ranks."""
    ids = torch.tensor(sequence, device=policy.device)
    place = torch.arange(len(ids) - 1, device=policy.device)
    with torch.no_grad(), policy.rounded(dtype):
        logprobs, _, _ = policy.root(ids, Packing((len(ids),), policy.device), place, ids[1:], 1.0)
    return _probe(sequence, logprobs.float().cpu().numpy())


def _probe(sequence: Sequence[int], logprobs: NDArray[np.float32]) -> Probe:
    if not np.isfinite(logprobs).all():
        raise Corrupt(
            "the policy's log-probs are not finite, so it is not published",
            fix="resume from an earlier checkpoint; lower the learning rate or max_grad_norm",
        )
    return Probe(token_ids=tuple(sequence), logprobs=tuple(logprobs.tolist()))


class _Scoring(torch.nn.Module):
    """Scoring as a module of its own, because only a module's weights can be stood in for."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self._model, self._policy = policy.model, policy

    def forward(self, sequence: Sequence[int]) -> Any:
        return sequence_logprobs(self._policy, sequence[:1], sequence[1:])


@dataclass(frozen=True)
class ProbeResult:
    """Differences between engine and learner, in nats; `bound` says in words what was asked."""

    max_abs_difference: float
    mean_abs_difference: float
    ok: bool
    bound: str


def compare(expected: Sequence[float], scored: Sequence[float], dtype: str) -> ProbeResult:
    """dtype: torch's name of what the engine computes in. A score that is not finite is a miss."""
    differences = np.abs(np.asarray(scored, np.float64) - np.asarray(expected, np.float64))
    most, mean = float(differences.max()), float(differences.mean())
    if dtype == "float32":
        return ProbeResult(most, mean, most <= MAX_FLOAT32, f"maximum {MAX_FLOAT32:g} in {dtype}")
    return ProbeResult(most, mean, mean <= MEAN_SIXTEEN_BIT, f"mean {MEAN_SIXTEEN_BIT:g} in {dtype}")
