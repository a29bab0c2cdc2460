"""Everything needed to go on exactly: weights, optimizer, random state, and the place in the log, as one directory.

    step-<step>-<token>/  with the files of `sapo_learner.checkpoint_files`

A directory gets its name only after everything in it is on the disk, so whatever has that name is whole, unless the
disk lost something later.

Newest means highest (token, step), not highest step. A newer token is a later writer, and that writer may have gone
back on purpose: after a restore of step 10 its step 12 continues the run, and step 20 of the writer before is the
branch that was left (I7). The same rule decides what `prune` keeps.
"""

import contextlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sapo_learner.checkpoint_facts import cursor_of, facts_of, newest, verified
from sapo_learner.checkpoint_files import (
    CheckpointState,
    is_sharded,
    load,
    load_facts,
    load_whole,
    with_tensors,
    write,
)
from sapo_learner.checkpoint_names import NAME, Found, age, list_whole, named
from sapo_learner.errors import Corrupt, Fenced
from sapo_learner.parallel import ALONE, Ranks
from sapo_learner.segment import fsync

__all__ = [
    "CheckpointState", "Found", "Loaded", "cursor_of", "facts_of", "is_sharded", "list_whole", "load", "load_facts",
    "load_newest", "load_whole", "oldest_cursor", "prune", "save", "with_tensors",
]  # fmt: skip
log = logging.getLogger(__name__)
_TEMPORARY = ".tmp-"


@dataclass(frozen=True, slots=True)
class Loaded:
    """`reason` says why newer checkpoints were passed over; empty when there was none."""

    state: CheckpointState
    found: Found
    reason: str


def save(directory: Path, state: CheckpointState, *, token: int, ranks: Ranks = ALONE) -> Path:
    """Write `state` as the checkpoint of `token` at its step and return its directory; durable (fsync) on return.

    ranks: that all call this, each with its share; rank 0's disk and the others' are the same.

    A whole checkpoint of the same step and token is left as it is: the same writer at the same step has the same
    state. Raises Fenced when a newer token has a checkpoint, OSError when the disk is full (nothing stays behind).
    """
    final = directory / f"step-{state.step:08d}-{token:08d}"
    if ranks.decided(lambda: _is_saved(final, token)):
        return final
    temporary = directory / f"{_TEMPORARY}{final.name}"
    try:
        ranks.decided(temporary.mkdir)
        write(temporary, state, ranks)
        ranks.decided(lambda: temporary.rename(final))
    except BaseException:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    ranks.decided(lambda: fsync(directory))
    return final


def _is_saved(final: Path, token: int) -> bool:
    """Whether it is there already, and whole; makes room for it if not."""
    directory = final.parent
    directory.mkdir(parents=True, exist_ok=True)
    _refuse_if_fenced(directory, token)
    if final.exists():
        try:
            verified(final)
        except Corrupt as error:
            log.warning("%s: %s; this checkpoint is saved anew", error.where, error.what)
            shutil.rmtree(final)
        else:
            fsync(directory)  # which may be what failed when it was saved
            return True
    _clear_leftovers(directory, token)
    return False


def load_newest(
    directory: Path,
    step: int | None = None,
    *,
    belongs: Callable[[int, str], bool] | None = None,
    read: Callable[[Path], CheckpointState] = load,
) -> Loaded:
    """The newest checkpoint (of `step`, if given) that is whole, and why newer ones were passed over.

    read: `load` or `load_facts`.

    belongs: (cursor, chain) -> whether the log has that chain there; a checkpoint of a branch that the log left, after
    Redis was lost or the archive cut short, must not be resumed. Raises NotFound when there is no checkpoint, Corrupt
    when none can be used.
    """
    mine = (lambda _: True) if belongs is None else (lambda state: belongs(state.cursor, state.chain))
    return Loaded(*newest(directory, step, read, mine))


def prune(directory: Path, keep: int, *, saved: Path | None = None, base: bool = True) -> list[Path]:
    """Delete all but the `keep` newest whole checkpoints, never `saved`; returns what was deleted.

    Damaged ones newer than the oldest kept stay, for a person to look at, and do not count. base: the oldest one of
    step 0 stays for ever, beyond `keep`, so that the whole archive can be replayed from it.
    """
    whole = list_whole(directory)
    for_ever = _base(whole) if base else None
    whole = [each for each in whole if each != for_ever]
    if len(whole) <= keep:
        return []
    oldest, spared = whole[max(keep, 1) - 1], {saved, for_ever.path if for_ever else None}
    doomed = [each.path for each in named(directory) if age(each) < age(oldest) and each.path not in spared]
    for path in doomed:
        hidden = path.rename(path.with_name(f"{_TEMPORARY}{path.name}"))  # half deleted must not look whole
        shutil.rmtree(hidden)
    return doomed


def oldest_cursor(directory: Path) -> int:
    """Up to where no whole checkpoint needs the archive, the base aside (see `prune`); 0 without another one."""
    whole, cursors = list_whole(directory), []
    for found in whole:
        if found != _base(whole):
            with contextlib.suppress(Corrupt):  # nobody can go on from that one
                cursors.append(cursor_of(found.path))
    return min(cursors, default=0)


def _base(whole: list[Found]) -> Found | None:
    """The oldest of step 0, unless it is all there is to go on from."""
    found = [each for each in whole[1:] if each.step == 0]
    return found[-1] if found else None


def _clear_leftovers(directory: Path, token: int) -> None:
    """Delete what a killed `save` or `prune` left; not the work in progress of a newer writer."""
    for path in directory.glob(f"{_TEMPORARY}*"):
        match = NAME.fullmatch(path.name.removeprefix(_TEMPORARY))
        if match and int(match[2]) <= token:
            shutil.rmtree(path, ignore_errors=True)


def _refuse_if_fenced(directory: Path, token: int) -> None:
    newest = max((found.token for found in named(directory)), default=0)
    if newest > token:
        raise Fenced(
            f"a learner with token {newest} saves here, ours is {token}",
            where=str(directory),
            fix="stop this process; the newer one goes on",
        )
