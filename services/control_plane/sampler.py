"""draw -> (epoch, problem, seed): the plain sampler, a seeded permutation of all problems per epoch.

A pure function of the run's seed and the draw's number, so nothing about it needs storing, and a draw that is offered
again is the same draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sapo_learner.errors import ConfigError
from services.tasks import Problem


@dataclass(frozen=True, slots=True)
class Draw:
    number: int
    epoch: int
    problem: Problem
    seed: int  # 63 bits, of the draw's responses


class PlainSampler:
    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        if not problems:
            raise ConfigError("the task has no training problem", where="task")
        self._problems, self._seed = problems, seed
        self._permutation = lru_cache(maxsize=2)(self._permute)  # leases straddle at most two epochs

    def draw(self, number: int) -> Draw:
        epoch, index = divmod(number, len(self._problems))
        return Draw(number, epoch, self._problems[self._permutation(epoch)[index]], derive_seed(self._seed, 0, number))

    def _permute(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, 1, epoch]).permutation(len(self._problems))


def derive_seed(*parts: int) -> int:
    """A 63-bit seed that depends on all parts."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
