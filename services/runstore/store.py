"""RunStore: everything the services keep in Redis about one run, and its state at one glance."""

import asyncio
import json
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from sapo_learner.errors import ConfigError, Unavailable
from services.runstore.leases import Leases
from services.runstore.log import Log
from services.runstore.registry import Registry

Role = Literal["learner", "control-plane"]


@dataclass(frozen=True, slots=True)
class OpenLease:
    """A lease that was neither used nor handed back. age_seconds since it was granted; remaining < 0: overdue."""

    draw: int
    attempt: int
    worker: str
    step: int
    age_seconds: float
    remaining_seconds: float


@dataclass(frozen=True, slots=True)
class RunState:
    """generation is None while the log must be rebuilt; sequence counts accepted entries; unread: not yet archived.

    reoffered: open draws that nobody holds, those set aside included.
    """

    generation: int | None
    sequence: int
    chain: str
    unread_entries: int
    unread_bytes: int
    next_draw: int
    reoffered: frozenset[int]
    leases: tuple[OpenLease, ...]
    uncounted: int
    registry_restored: bool
    published_version: int | None
    published_step: int | None
    learner_token: int
    memory_used_bytes: int

    @property
    def oldest_lease_seconds(self) -> float:
        """Age of the oldest open lease; 0 without one."""
        return max((lease.age_seconds for lease in self.leases), default=0.0)


class RunStore(Log, Leases, Registry):
    """`async with await RunStore.connect(url, run) as store: ...`"""

    async def acquire_token(self, role: Role, *, floor: int = 0) -> int:
        """A token newer than all before: the older holders of the role are refused from now on.

        floor: the newest token the caller knows of from elsewhere (the newest archive segment), for a lost server.
        """
        token = int(await self._script("acquire", ["tokens"], role, floor))
        if role == "control-plane":
            # Whoever starts one has perhaps mended what made every group of a draw malformed.
            await self._script("readmit", ["reoffered", "refusals"])
        return token

    async def claim(self, identity: str) -> None:
        """Say which run of this name we are. Raises ConfigError when the server holds another one's state."""
        await self._command("SETNX", "identity", identity)
        found = (await self._command("GET", "identity") or b"").decode()
        if found != identity:
            raise ConfigError(
                f"another run of the name {self.run!r} is kept there ({found}, ours is {identity})",
                where=f"Redis at {self.address}",
                fix="choose another run.name; or, if that run is no more, delete its keys there "
                f"(all that begin with {self._keys('')[0]})",
            )

    async def ping(self, seconds: float) -> None:
        """Raises Unavailable when the server has not answered within so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                await self._call(self._redis.ping, patience=seconds)
        except TimeoutError:
            raise Unavailable(
                f"no answer within {seconds:g} s",
                where=f"Redis at {self.address}",
                fix="is it running, and is SAPO_REDIS_URL its address?",
            ) from None

    async def state(self) -> RunState:
        """One consistent look; the memory in use is read beside it."""
        keys = ["state", "registry", "tokens", "log", "leases", "lease_info", "reoffered"]
        now, state_fields, registry_fields, token, unread, reoffered, leases = await self._script("state", keys)
        fields, registry = _pairs(state_fields), _pairs(registry_fields)
        version = int(registry.get(b"version", -1))
        return RunState(
            generation=int(fields[b"generation"]) if b"generation" in fields else None,
            sequence=int(fields.get(b"sequence", 0)),
            chain=fields.get(b"chain", b"").decode(),
            unread_entries=int(unread),
            unread_bytes=int(fields.get(b"bytes", 0)),
            next_draw=int(fields.get(b"next_draw", 0)),
            reoffered=frozenset(int(draw) for draw in reoffered),
            leases=tuple(_open_lease(int(now), *leases[at : at + 3]) for at in range(0, len(leases), 3)),
            uncounted=int(fields.get(b"uncounted", 0)),
            registry_restored=b"version" in registry,
            published_version=version if version >= 0 else None,
            published_step=int(registry[b"step"]) if b"step" in registry else None,
            learner_token=int(token or 0),
            memory_used_bytes=int((await self._info())["used_memory"]),
        )

    async def erase(self) -> int:
        """Forget everything about the run, to start anew under its old name. Returns the number of keys deleted."""
        cursor, erased = 0, 0
        while True:
            cursor, keys = await self._call(partial(self._redis.scan, cursor, match=self._keys("*")[0], count=1000))
            for key in keys:
                erased += int(await self._call(partial(self._redis.delete, key)))
            if not cursor:
                return erased

    async def open_draws(self) -> set[int]:
        """Leased or offered again: draws below next_draw that no entry answers yet."""
        state = await self.state()
        return {lease.draw for lease in state.leases} | state.reoffered

    async def open_leases(self) -> list[OpenLease]:
        """By deadline, the nearest first."""
        return list((await self.state()).leases)


def _pairs(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _open_lease(now: int, draw: bytes, deadline: bytes, info: bytes) -> OpenLease:
    facts: dict[str, Any] = json.loads(info)
    return OpenLease(
        draw=int(draw),
        attempt=int(facts["attempt"]),
        worker=str(facts["worker"]),
        step=int(facts["step"]),
        age_seconds=(now - int(facts["granted"])) / 1000,
        remaining_seconds=(float(deadline) - now) / 1000,
    )
