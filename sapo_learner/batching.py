"""Groups -> TrainingBatch: the only place where numbers become tensors.

A microbatch holds whole sequences (prompt + response) one behind the other, without padding, and the [T] view of their
response tokens that objectives work on. A response is never split, a group may be.
Shape letters: N tokens of all sequences, T response tokens.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapo_learner.advantages import has_signal
from sapo_learner.aggregation import StepCounts
from sapo_learner.trajectory import Trajectory, TrajectoryGroup


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass needs."""

    input_ids: Tensor  # [N] int64
    lengths: tuple[int, ...]  # tokens of each sequence, in order, the longest first; N in all
    predictor: Tensor  # [T] int64: index into the N tokens, of the one whose hidden state predicts the token
    targets: Tensor  # [T] int64 token ids
    behaviour_logprobs: Tensor  # [T] float32
    advantages: Tensor  # [T] float64
    loss_mask: Tensor  # [T] bool
    sequence_ids: Tensor  # [T] int64, unique over the step
    policy_age: Tensor  # [T] int64, optimizer steps
    truncated: Tensor  # [T] bool, whether the token limit cut the response off
    groups: tuple[int, ...]  # indices of the groups whose responses are in it


@dataclass(frozen=True)
class TrainingBatch:
    """One optimizer step's data: microbatches with signal, and the counts that normalise the whole step."""

    microbatches: tuple[Microbatch, ...]
    counts: StepCounts
    signal: tuple[bool, ...]  # per group: whether it moves the policy; the others are in no microbatch
    sequences: tuple[tuple[int, int], ...]  # by sequence id: which group, and which of its responses


@dataclass(frozen=True)
class _Row:
    prompt_ids: NDArray[np.int32]
    response: Trajectory
    advantage: float
    sequence_id: int
    group: int
    index: int

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response.token_ids)


def collate(
    groups: Sequence[TrajectoryGroup],
    advantages: Sequence[NDArray[np.float64]],
    *,
    step: int,
    microbatch_tokens: int,
    normalise_by: Literal["step", "signal"] = "step",
    ranks: int = 1,
) -> TrainingBatch:
    """Pack the responses of all groups with signal: one with sampled tokens has an advantage that is not 0.

    advantages: one [G] array per group. step: optimizer steps done before this one, from which ages are counted.
    microbatch_tokens: most tokens of a microbatch, prompts included, unless it is one longer response. normalise_by
    "step": groups without signal count in the denominators. ranks: that will share the microbatches, so that there are
    as many for each, if there are responses enough.
    """
    rows: list[_Row] = []
    signal: list[bool] = []
    counts = StepCounts(sequences=0, tokens=0)
    for number, (group, group_advantages) in enumerate(zip(groups, advantages, strict=True)):
        sampled = np.array([trajectory.loss_mask.sum() for trajectory in group.trajectories])  # [G] tokens
        signal.append(has_signal(group_advantages[sampled > 0]))
        if signal[-1] or normalise_by == "step":
            counts += StepCounts(sequences=int((sampled > 0).sum()), tokens=int(sampled.sum()))
        if signal[-1]:
            for index in np.flatnonzero(sampled):
                response, advantage = group.trajectories[index], float(group_advantages[index])
                rows.append(_Row(group.prompt_ids, response, advantage, len(rows), number, int(index)))
    sequences = tuple((row.group, row.index) for row in rows)
    microbatches = tuple(_microbatch(part, step) for part in _packs(rows, microbatch_tokens, ranks))
    return TrainingBatch(microbatches, counts, tuple(signal), sequences)


def idle_microbatch(like: Microbatch) -> Microbatch:
    """One token that counts nowhere, for a rank that has no microbatch left while others have one."""
    one, none = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    return Microbatch(
        input_ids=like.input_ids[:1], lengths=(1,), predictor=one, targets=like.targets[:1],
        behaviour_logprobs=none.float(), advantages=none, loss_mask=one.bool(), sequence_ids=one, policy_age=one,
        truncated=one.bool(), groups=(),
    )  # fmt: skip


def _packs(rows: list[_Row], budget: int, ranks: int) -> list[list[_Row]]:
    """About as few packs as the budget allows, and about equally full, for ranks that share them wait for the last."""
    rows = sorted(rows, key=lambda each: -each.length)  # stable: equal lengths keep the log's order
    alone = [row.length for row in rows if row.length >= budget]
    rest = sum(row.length for row in rows) - sum(alone)
    count = len(alone) + -(-rest // budget)
    packs = _spread(rows, _multiple(count, ranks))
    while any(len(pack) > 1 and sum(row.length for row in pack) > budget for pack in packs):
        count += max(1, count // 16)
        packs = _spread(rows, _multiple(count, ranks))
    return packs


def _multiple(count: int, ranks: int) -> int:
    return -(-count // ranks) * ranks


def _spread(rows: list[_Row], count: int) -> list[list[_Row]]:
    """Rows, longest first, each to the pack that has least so far."""
    packs: list[list[_Row]] = [[] for _ in range(min(count, len(rows)))]
    load = [(0, index) for index in range(len(packs))]
    for row in rows:
        held, index = load[0]
        packs[index].append(row)
        heapq.heapreplace(load, (held + row.length, index))
    return packs


def _microbatch(rows: list[_Row], step: int) -> Microbatch:
    predictor = []
    start = 0
    for row in rows:
        first = start + len(row.prompt_ids) - 1  # the last prompt token predicts the first response token
        predictor.append(np.arange(first, first + len(row.response.token_ids)))
        start += row.length
    ids = [part for row in rows for part in (row.prompt_ids, row.response.token_ids)]
    lengths = [len(row.response.token_ids) for row in rows]
    return Microbatch(
        input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        lengths=tuple(row.length for row in rows),
        predictor=torch.from_numpy(np.concatenate(predictor)),
        targets=torch.from_numpy(np.concatenate([row.response.token_ids for row in rows]).astype(np.int64)),
        behaviour_logprobs=torch.from_numpy(np.concatenate([row.response.behaviour_logprobs for row in rows])),
        advantages=torch.from_numpy(np.repeat([row.advantage for row in rows], lengths)),
        loss_mask=torch.from_numpy(np.concatenate([row.response.loss_mask for row in rows])),
        sequence_ids=torch.from_numpy(np.repeat([row.sequence_id for row in rows], lengths)),
        policy_age=torch.from_numpy(step - np.concatenate([row.response.token_steps() for row in rows])),
        truncated=torch.from_numpy(np.repeat([row.response.finish_reason == "length" for row in rows], lengths)),
        groups=tuple(sorted({row.group for row in rows})),
    )
