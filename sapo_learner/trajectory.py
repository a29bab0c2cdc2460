"""What was sampled: facts only, no estimates. Frozen, numpy, validated on construction; no torch.

Shape letter: T = tokens of one response (tool output included).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sapo_learner.errors import InvalidTrajectory

SCHEMA_VERSION = 1

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
        _require(np.isfinite(self.temperature) and self.temperature > 0, f"temperature {self.temperature} is not > 0")
        _require(self.max_tokens > 0, f"max_tokens {self.max_tokens} is not > 0")
        _require(
            self.top_p == 1.0 and self.top_k == 0,
            f"truncated sampling (top_p {self.top_p}, top_k {self.top_k}) renormalises the behaviour policy, "
            "which the recorded log-probs do not account for: use top_p 1 and top_k 0",
        )
        _require(self.logprob_mode in ("processed", "raw"), f"log-prob mode {self.logprob_mode!r} is unknown")
        _require(
            self.logprob_mode == "processed" or self.temperature == 1.0,
            f"raw log-probs at temperature {self.temperature} are not those of the sampling distribution",
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
        _require(count > 0, "a response has no token")
        for name, array, dtype in (
            ("token_ids", self.token_ids, np.int32),
            ("behaviour_logprobs", self.behaviour_logprobs, np.float32),
            ("loss_mask", self.loss_mask, np.bool_),
        ):
            _require(array.dtype == dtype, f"{name} is {array.dtype}, expected {np.dtype(dtype)}")
            _require(array.shape == (count,), f"{name} has shape {array.shape}, expected ({count},)")
            array.setflags(write=False)
        _require(bool((self.token_ids >= 0).all()), "a token id is negative")
        _require(bool(np.isfinite(self.behaviour_logprobs).all()), "a behaviour log-prob is not finite")
        _require(bool((self.behaviour_logprobs <= 1e-6).all()), "a behaviour log-prob is above 0")
        _require(all(span.length > 0 for span in self.spans), "a version span is empty")
        _require(all(span.version >= 0 and span.step >= 0 for span in self.spans), "a version span is negative")
        total = sum(span.length for span in self.spans)
        _require(total == count, f"version spans cover {total} tokens of {count}")
        _require(len(self.rewards) > 0, "a response has no reward")
        _require(all(np.isfinite(value) for value in self.rewards.values()), "a reward is not finite")
        _require(bool(np.isfinite(self.reward)), "the sum of the reward components is not finite")
        _require(self.finish_reason in ("stop", "length"), f"finish reason {self.finish_reason!r} is unknown")

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
    seed: what the sampler was seeded with. engine: name and version, for the record.
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
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _require(self.schema_version == SCHEMA_VERSION, f"schema version {self.schema_version} is not {SCHEMA_VERSION}")
        _require(self.draw >= 0 and self.attempt >= 1, "draw or attempt out of range")
        _require(self.epoch >= 0 and self.seed >= 0, "epoch or seed is negative")
        _require(self.prompt_ids.dtype == np.int32 and self.prompt_ids.ndim == 1, "prompt_ids is not one int32 vector")
        _require(len(self.prompt_ids) > 0, "the prompt has no token")
        _require(bool((self.prompt_ids >= 0).all()), "a prompt token id is negative")
        self.prompt_ids.setflags(write=False)
        _require(len(self.trajectories) > 0, "the group has no response")
        names = {tuple(sorted(trajectory.rewards)) for trajectory in self.trajectories}
        _require(len(names) == 1, f"responses carry different reward components: {sorted(names)}")

    @property
    def oldest_step(self) -> int:
        """The smallest optimizer step that any token of the group was sampled under."""
        return min(span.step for trajectory in self.trajectories for span in trajectory.spans)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidTrajectory(message)
