"""Who computes which microbatch of a step when: every rank makes as many forward and backward passes as any other."""

from collections.abc import Sequence
from dataclasses import dataclass

from sapo_learner.batching import Microbatch, idle_microbatch
from sapo_learner.parallel import Ranks


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass of this rank, while every other rank makes one."""

    index: int | None
    """Of the microbatch in the step; None where this rank only takes part."""
    microbatch: Microbatch
    groups: list[int]
    """Whose responses are in the microbatches of any rank."""


def passes(microbatches: Sequence[Microbatch], ranks: Ranks) -> list[Pass]:
    """This rank's, in order; shared out by tokens."""
    shares = ranks.shares([len(each.input_ids) for each in microbatches])
    return [_pass(microbatches, together, ranks.rank) for together in zip(*shares, strict=True)]


def _pass(microbatches: Sequence[Microbatch], together: Sequence[int | None], rank: int) -> Pass:
    index = together[rank]
    mine = idle_microbatch(microbatches[0]) if index is None else microbatches[index]
    groups = {group for each in together if each is not None for group in microbatches[each].groups}
    return Pass(index, mine, sorted(groups))
