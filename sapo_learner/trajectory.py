"""What was sampled: facts only, no estimates. Frozen, numpy, validated on construction; no torch.

Shape letter: T = tokens of one response (tool output included).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sapo_learner import formats
from sapo_learner.errors import InvalidTrajectory

SCHEMA_VERSION = formats.WIRE.newest
MAX_INTEGER = 2**63 - 1  # of draws and seeds: what every part of the service can hold

# What to do about it, for whoever runs the worker.
_SAME_VERSION = "run all services at the same version"
_FROM_CONTROL_PLANE = "take draws, prompts and sampling settings from the control plane as they are"
_LOGPROBS = "record for every token the natural log-prob that the engine sampled it with, and 0 where loss_mask is off"
_TOKENIZER = "encode with the tokenizer of the run's published policy"
_SPANS = "state the policy of every token, in order"
_REWARDS = "score every response with the same finite components"

FinishReason = Literal["stop", "length"]
LogprobMode = Literal["processed", "raw"]


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """`length` consecutive response tokens sampled under one policy: its version number and its optimizer step."""

    length: int
    version: int
    step: int


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How tokens were drawn. `logprob_mode` "processed": log-probs of the distribution after temperature."""

    temperature: float
    max_tokens: int
    top_p: float = 1.0
    top_k: int = 0
    logprob_mode: LogprobMode = "processed"

    def __post_init__(self) -> None:
        positive = np.isfinite(self.temperature) and self.temperature > 0
        _require(positive, f"temperature {self.temperature} is not > 0", fix=_FROM_CONTROL_PLANE)
        _require(self.max_tokens > 0, f"max_tokens {self.max_tokens} is not > 0", fix=_FROM_CONTROL_PLANE)
        _require(
            self.top_p == 1.0 and self.top_k == 0,
            f"truncated sampling (top_p {self.top_p}, top_k {self.top_k}) renormalises the behaviour policy, "
            "which the recorded log-probs do not account for: use top_p 1 and top_k 0",
        )
        known = self.logprob_mode in ("processed", "raw")
        _require(known, f"log-prob mode {self.logprob_mode!r} is unknown", fix=_SAME_VERSION)
        _require(
            self.logprob_mode == "processed" or self.temperature == 1.0,
            f"raw log-probs at temperature {self.temperature} are not those of the sampling distribution: use log-prob "
            "mode processed, or temperature 1",
            fix="record processed ones, or sample at temperature 1",
        )


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One response.

    token_ids: [T] int32. behaviour_logprobs: [T] float32, nats, log-prob of each token under the policy and the
    temperature it was sampled with; 0 where loss_mask is False. loss_mask: [T] bool, False = not sampled by the policy.
    spans: policy per token, lengths summing to T. rewards: named components.
    """

    token_ids: NDArray[np.int32]
    behaviour_logprobs: NDArray[np.float32]
    loss_mask: NDArray[np.bool_]
    spans: tuple[VersionSpan, ...]
    rewards: Mapping[str, float]
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        count = len(self.token_ids)
        _require(count > 0, "a response has no token", fix="send what was sampled, its last token included")
        for name, array, dtype in (
            ("token_ids", self.token_ids, np.int32),
            ("behaviour_logprobs", self.behaviour_logprobs, np.float32),
            ("loss_mask", self.loss_mask, np.bool_),
        ):
            _require_per_token(name, array, np.dtype(dtype), count)
            array.setflags(write=False)
        _require_all("token id", self.token_ids, self.token_ids >= 0, "negative", _TOKENIZER)
        logprobs = self.behaviour_logprobs
        _require_all("behaviour log-prob", logprobs, np.isfinite(logprobs), "not finite", _LOGPROBS)
        _require_all("behaviour log-prob", logprobs, logprobs <= 1e-6, "above 0", _LOGPROBS)
        self._check_spans(count)
        _require(len(self.rewards) > 0, "a response has no reward", fix=_REWARDS)
        for name, value in self.rewards.items():
            _require(bool(np.isfinite(value)), f"reward {name!r} is {value}: a reward is not finite", fix=_REWARDS)
        _require(bool(np.isfinite(self.reward)), "the sum of the reward components is not finite", fix=_REWARDS)
        known = self.finish_reason in ("stop", "length")
        _require(known, f"finish reason {self.finish_reason!r} is unknown", fix=_SAME_VERSION)

    def _check_spans(self, count: int) -> None:
        at = 0
        for span in self.spans:
            _require(span.length > 0, "a version span is empty", where=f"token {at}", fix=_SPANS)
            known = span.version >= 0 and span.step >= 0
            _require(known, "a version span is negative", where=f"token {at}", fix=_SPANS)
            at += span.length
        _require(at == count, f"version spans cover {at} tokens of {count}", fix=_SPANS)

    @property
    def reward(self) -> float:
        """Sum of the reward components."""
        return float(sum(self.rewards.values()))

    def token_steps(self) -> NDArray[np.int64]:
        """[T] int64: the optimizer step of the policy that sampled each token."""
        return np.repeat([span.step for span in self.spans], [span.length for span in self.spans]).astype(np.int64)

    def token_versions(self) -> NDArray[np.int64]:
        """[T] int64: the version of the policy that sampled each token."""
        return np.repeat([span.version for span in self.spans], [span.length for span in self.spans]).astype(np.int64)


@dataclass(frozen=True, slots=True)
class TrajectoryGroup:
    """All responses to one draw: the unit of work, of the log and of the advantage.

    draw: run-long integer, accepted at most once. attempt: which lease of it. prompt_ids: [P] int32.
    seed: what the sampler was seeded with. engine: name and version, for the record. traceparent: W3C Trace Context,
    which joins logs and steers nothing; "": none.
    """

    draw: int
    attempt: int
    task: str
    prompt_id: str
    epoch: int
    seed: int
    prompt_ids: NDArray[np.int32]
    trajectories: tuple[Trajectory, ...]
    sampling: SamplingParameters
    engine: str
    worker: str = ""
    traceparent: str = ""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not formats.WIRE.reads(self.schema_version):  # before a text is written that nobody reads
            _require(False, formats.WIRE.refusal(self.schema_version), fix=formats.WIRE.fix(self.schema_version))
        in_range = 0 <= self.draw <= MAX_INTEGER and 1 <= self.attempt < 2**32
        _require(in_range, "draw or attempt out of range", fix=_FROM_CONTROL_PLANE)
        in_range = 0 <= self.epoch < 2**32 and 0 <= self.seed <= MAX_INTEGER
        _require(in_range, "epoch or seed out of range", fix=_FROM_CONTROL_PLANE)
        is_vector = self.prompt_ids.dtype == np.int32 and self.prompt_ids.ndim == 1
        _require(is_vector, "prompt_ids is not one int32 vector", fix=_SAME_VERSION)
        _require(len(self.prompt_ids) > 0, "the prompt has no token", fix=_FROM_CONTROL_PLANE)
        _require_all("prompt token id", self.prompt_ids, self.prompt_ids >= 0, "negative", _TOKENIZER, "prompt, ")
        self.prompt_ids.setflags(write=False)
        _require(len(self.trajectories) > 0, "the group has no response", fix="send sampling.group_size of them")
        names = {tuple(sorted(trajectory.rewards)) for trajectory in self.trajectories}
        _require(len(names) == 1, f"responses carry different reward components: {sorted(names)}", fix=_REWARDS)

    @property
    def oldest_step(self) -> int:
        """The smallest optimizer step that any token of the group was sampled under."""
        return min(span.step for trajectory in self.trajectories for span in trajectory.spans)


def _require(condition: bool, what: str, *, where: str = "", fix: str = "") -> None:
    if not condition:
        raise InvalidTrajectory(what, where=where, fix=fix)


def _require_per_token(name: str, array: NDArray[Any], dtype: np.dtype[Any], count: int) -> None:
    if array.dtype == dtype and array.shape == (count,):
        return  # before texts are written that nobody reads: they would take as long as all that is checked
    _require(array.dtype == dtype, f"{name} is {array.dtype}, expected {dtype}", fix=_SAME_VERSION)
    one_each = f"{name} has shape {array.shape}, expected ({count},)"
    _require(array.shape == (count,), one_each, fix="give every token one id, one log-prob and one mask value")


def _require_all(
    name: str, values: NDArray[Any], good: NDArray[np.bool_], wrong: str, fix: str, part: str = ""
) -> None:
    """Name the first element that is not good, and its position."""
    if not good.all():
        at = int(np.argmin(good))
        raise InvalidTrajectory(f"{name} {values[at]} is {wrong}", where=f"{part}token {at}", fix=fix)
