"""The head of the log: entries that nobody has archived yet."""

import hashlib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sapo_learner.archive import Entry, Head
from services.runstore.connection import Connection, OutOfMemory

AppendStatus = Literal["OK", "DUPLICATE", "EXPIRED", "FULL", "NOT_READY"]
MAX_REFUSALS = 3  # of one draw: then it is set aside, or a prompt that nobody can answer would be sampled for ever


@dataclass(frozen=True, slots=True)
class AppendResult:
    """OK: in the log as `id`. DUPLICATE, EXPIRED: final, drop the group. FULL, NOT_READY: keep it and try again."""

    status: AppendStatus
    id: str = ""
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """INVALID: the draw is offered again, or set aside after MAX_REFUSALS; refusals 0: another worker holds it.

    Else what append would have said of the group, had it been well-formed.
    """

    status: Literal["INVALID", "DUPLICATE", "EXPIRED", "NOT_READY"]
    refusals: int

    @property
    def set_aside(self) -> bool:
        """The draw stays open, but is offered again only when another control plane starts."""
        return self.refusals >= MAX_REFUSALS


class Log(Connection):
    """Appended to by ingest; read, trimmed and rebuilt by the learner alone."""

    async def append(
        self, draw: int, attempt: int, payload: bytes, *, kind: str = "group", max_entries: int, max_bytes: int
    ) -> AppendResult:
        """Append one group if `attempt` is the draw's current one; the draw is closed with it.

        OK        appended
        DUPLICATE the draw was accepted before
        EXPIRED   the draw is leased to another attempt, offered again, or was never leased
        FULL      max_entries or max_bytes (or the server's memory) would be exceeded; the lease lives on meanwhile
        NOT_READY the log must be rebuilt first
        """
        keys = ["state", "log", "index", "leases", "lease_info", "lease_steps", "reoffered", "attempts", "refusals"]
        try:
            reply = await self._script(
                "append", keys, draw, attempt, kind, payload, _sha256(payload), max_entries, max_bytes
            )
        except OutOfMemory:
            reply = [b"FULL"]
        result = _append_result(reply)
        if result.status == "FULL":
            await self._script("hold", ["leases", "lease_info"], draw, attempt)
        return result

    async def refuse(self, worker: str, draw: int, attempt: int) -> Refusal:
        """End the lease of a group that must not enter the log, unless the draw is settled or another's anyway."""
        keys = ["state", "leases", "lease_info", "lease_steps", "reoffered", "refusals"]
        status, refusals = await self._script("refuse", keys, worker, draw, attempt, MAX_REFUSALS)
        return Refusal(status.decode(), int(refusals))

    async def append_control(self, token: int, kind: str, payload: bytes) -> AppendResult:
        """Append an entry that belongs to no draw (`config`, `end`). OK or NOT_READY."""
        keys = ["tokens", "state", "log", "index"]
        reply = await self._script("append_control", keys, token, uuid.uuid4().hex, kind, payload, _sha256(payload))
        return _append_result(reply)

    async def read(self, after: int, count: int, block_ms: int = 0) -> list[Entry]:
        """Up to `count` entries with a sequence above `after`, in order; waits up to `block_ms` for the first.

        May return early with nothing. Check `needs_rebuild` when it stays empty, or when what comes does not chain.
        """
        generation = await self._command("HGET", "state", "generation")
        # Entries of one generation only: a rebuild empties the stream. Without a generation it is empty, too.
        start = f"{int(generation or 0)}-{after}"
        # A blocked read must come back before the socket's time limit takes the server for dead.
        block = min(block_ms, int(self.timeout * 500))
        blocking = ["BLOCK", block] if block > 0 else []
        key = self._keys("log")[0]
        streams = await self._call(
            lambda: self._redis.execute_command("XREAD", "COUNT", count, *blocking, "STREAMS", key, start)
        )
        return [_entry(identifier, fields) for identifier, fields in streams[0][1]] if streams else []

    async def trim(self, token: int, through: Head) -> int:
        """Forget the entries up to `through`, the archive's head. Returns how many there were.

        Raises Corrupt, and removes nothing, when the log ends before or has another chain there. Fenced.
        """
        keys = ["tokens", "state", "log", "index"]
        return int(await self._script("trim", keys, token, through.sequence, through.chain))

    async def needs_rebuild(self, head: Head) -> str | None:
        """Why the log does not go on from the archive's head, or None when it does."""
        reason: bytes = await self._script("check", ["state", "index"], head.sequence, head.chain)
        return reason.decode() or None

    async def rebuild(
        self,
        token: int,
        head: Head,
        accepted_draws: Iterable[int],
        *,
        next_draw: int = 0,
        uncounted: int = 0,
    ) -> int:
        """Begin a new generation that goes on from the archive's head (a fresh run: from Head()). Returns it.

        The draws below `next_draw` (at least the highest accepted one + 1) that were not accepted are offered again.
        """
        accepted = set(accepted_draws)
        beyond = max(next_draw, max(accepted, default=-1) + 1)
        still_open = [draw for draw in range(beyond) if draw not in accepted]
        draws = ["leases", "lease_info", "lease_steps", "reoffered", "attempts", "refusals"]
        keys = ["tokens", "state", "log", "index", *draws]
        position = (head.generation, head.sequence, head.chain)
        return int(
            await self._script("rebuild", keys, token, uuid.uuid4().hex, *position, beyond, uncounted, *still_open)
        )

    async def set_uncounted(self, token: int, uncounted: int) -> None:
        """How many entries of the log did not count towards a step; pacing grants as many more."""
        await self._write("learner", token, "HSET", "state", "uncounted", str(uncounted))


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def _append_result(reply: list[Any]) -> AppendResult:
    status = reply[0].decode()
    return AppendResult(status, reply[1].decode(), int(reply[2])) if status == "OK" else AppendResult(status)


def _entry(identifier: bytes, fields: dict[bytes, bytes]) -> Entry:
    generation, sequence = identifier.split(b"-")
    return Entry(
        generation=int(generation),
        sequence=int(sequence),
        kind=fields[b"kind"].decode(),
        draw=int(fields[b"draw"]),
        chain=fields[b"chain"].decode(),
        payload=fields[b"payload"],
    )
