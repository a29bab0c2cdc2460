"""Leases: attempts at draws, with a deadline by the server's clock, granted as far as pacing allows (design 4.1)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.runstore.connection import Connection


@dataclass(frozen=True, slots=True)
class Pacing:
    """How far sampling may run ahead of training; B = groups_per_step.

    lookahead: steps that may be sampled beyond the published one. max_policy_age: how old, in optimizer steps, a group
    may be when it is used. steps: length of the run. Durations in seconds.
    """

    groups_per_step: int
    lookahead: int
    max_policy_age: int
    steps: int
    lease_seconds: float
    max_lease_seconds: float


@dataclass(frozen=True, slots=True)
class Lease:
    """One attempt at a draw. Times are milliseconds by the server's clock. Attempts rise, also over a rebuild."""

    draw: int
    attempt: int
    deadline_ms: int
    granted_ms: int


@dataclass(frozen=True, slots=True)
class Grant:
    """waiting_for: the rule that kept more from being granted ("steps", "lookahead", "max_policy_age"), "not ready"
    while the log or the registry must be rebuilt or nothing is published, None when everything asked for was granted.
    """

    leases: list[Lease]
    waiting_for: str | None


class Leases(Connection):
    """Granted by the control plane, used up by `append`."""

    async def grant(self, token: int, worker: str, count: int, worker_step: int, pacing: Pacing) -> Grant:
        """Lease up to `count` draws to a worker that samples under the policy of `worker_step`, lowest draws first."""
        keys = ["tokens", "state", "registry", "leases", "lease_info", "lease_steps", "reoffered", "attempts"]
        rules = (pacing.groups_per_step, pacing.lookahead, pacing.max_policy_age, pacing.steps)
        durations = (_milliseconds(pacing.lease_seconds), _milliseconds(pacing.max_lease_seconds))
        waiting_for, *rest = await self._script("grant", keys, token, worker, count, worker_step, *rules, *durations)
        values = [int(value) for value in rest]
        leases = [Lease(*values[at : at + 4]) for at in range(0, len(values), 4)]
        return Grant(leases, waiting_for.decode() or None)

    async def renew(self, worker: str, progress: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """`progress`: (draw, attempt, tokens sampled since the last call). Only tokens > 0 extend a lease.

        Returns the (draw, attempt) pairs that are no longer this worker's: stop sampling them.
        """
        arguments = [number for each in progress for number in each]
        lost = [int(value) for value in await self._script("renew", ["leases", "lease_info"], worker, *arguments)]
        return list(zip(lost[::2], lost[1::2], strict=True))

    async def release(self, worker: str, leases: Iterable[tuple[int, int]]) -> int:
        """Hand (draw, attempt) pairs back; they are offered again at once. Returns how many were this worker's."""
        arguments = [number for each in leases for number in each]
        keys = ["leases", "lease_info", "lease_steps", "reoffered"]
        return int(await self._script("release", keys, worker, *arguments))


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
