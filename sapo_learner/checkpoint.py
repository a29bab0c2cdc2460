"""Everything needed to go on exactly: weights, optimizer, random state, and the place in the log, as one directory.

    step-<step>-<token>/  model.safetensors  optimizer.safetensors  rng.safetensors  checkpoint.json
                          shards/ in place of the first two, where several ranks each hold a share

checkpoint.json names size and SHA-256 of the others and of itself. A directory gets its name only after everything in
it is on the disk, so whatever has that name is whole, unless the disk lost something later.

Newest means highest (token, step), not highest step. A newer token is a later writer, and that writer may have gone
back on purpose: after a restore of step 10 its step 12 continues the run, and step 20 of the writer before is the
branch that was left (I7). The same rule decides what `prune` keeps.
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from sapo_learner import shards
from sapo_learner.disk import naming
from sapo_learner.errors import Corrupt, Fenced, NotFound
from sapo_learner.manifest import Blob
from sapo_learner.parallel import ALONE, Ranks
from sapo_learner.segment import fsync
from sapo_learner.snapshot import LazyTensors, save_tensors, tensors_in

log = logging.getLogger(__name__)

_FORMAT = 1
_FACTS = "checkpoint.json"
_SHARES = ("model", "optimizer")  # what ranks may each hold a share of
_TENSORS = (*_SHARES, "rng")
_NAME = re.compile(r"step-(\d{8,})-(\d{8,})")
_TEMPORARY = ".tmp-"


@dataclass
class CheckpointState:
    """step: optimizer steps done. cursor, chain: last log entry consumed and the log's hash there.

    model, optimizer, rng: flat names -> tensors that share no storage. ledger, environment (torch version, threads,
    world size, ...), published and extra must survive JSON; floats do exactly.
    """

    step: int
    cursor: int
    chain: str
    ledger: dict[str, int]
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    environment: dict[str, Any] = field(default_factory=dict)
    published: list[Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Found:
    step: int
    token: int
    path: Path


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
        _write(temporary, state, ranks)
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
            _verified(final)
        except Corrupt as error:
            log.warning("%s: %s; this checkpoint is saved anew", error.where, error.what)
            shutil.rmtree(final)
        else:
            fsync(directory)  # which may be what failed when it was saved
            return True
    _clear_leftovers(directory, token)
    return False


def list_whole(directory: Path) -> list[Found]:
    """Checkpoints whose files are all there with the right sizes, newest first. Digests are checked on loading."""
    return [found for found in _named(directory) if _sizes_fit(found.path)]


def load(path: Path) -> CheckpointState:
    """Read a checkpoint, checking every digest. Tensors are whole and on the CPU, each read when it is asked for where
    one process saved it (`tensors_in`).

    Raises Corrupt naming the file and another checkpoint to try, NotFound when there is no such directory.
    """
    return with_tensors(load_facts(path), path)


def with_tensors(state: CheckpointState, path: Path) -> CheckpointState:
    """`state` of the checkpoint at `path`, with its model and optimizer."""
    if is_sharded(path):
        for name, tensor in shards.read(path).items():
            kind, _, own = name.partition("/")
            getattr(state, kind)[own] = tensor
    else:
        state.model, state.optimizer = (_read(path / f"{name}.safetensors") for name in _SHARES)
    return state


def load_facts(path: Path) -> CheckpointState:
    """Everything but model and optimizer; their digests are checked, too. Raises what `load` does."""
    if not path.is_dir():
        raise NotFound("no such checkpoint", where=str(path))
    facts = _verified(path)
    rest: dict[str, Any] = {
        each.name: facts[each.name] for each in fields(CheckpointState) if each.name not in _TENSORS
    }
    return CheckpointState(**rest, model={}, optimizer={}, rng=dict(_read(path / "rng.safetensors")))


def is_sharded(path: Path) -> bool:
    return (path / shards.METADATA).exists()


def load_whole(path: Path) -> Mapping[str, Tensor]:
    """Model and optimizer of a checkpoint that is not sharded, named as among shards; each read when asked for."""
    parts = {kind: tensors_in(path / f"{kind}.safetensors") for kind in _SHARES}
    held = {f"{kind}/{name}": each for kind, part in parts.items() for name, each in part.held.items()}

    def read(name: str, _: Tensor) -> Tensor:
        kind, own = name.split("/", 1)
        return parts[kind][own]

    return LazyTensors(held, read)


def share_of(state: CheckpointState) -> dict[str, Tensor]:
    """Model and optimizer as they are named among shards."""
    return {f"{kind}/{name}": each for kind in _SHARES for name, each in getattr(state, kind).items()}


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        return tensors_in(path)
    except safetensors.SafetensorError as error:
        raise _corrupt(path, str(error)) from None


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
    candidates = [found for found in _named(directory) if step is None or found.step == step]
    if not candidates:
        steps = ", ".join(sorted({str(found.step) for found in _named(directory)}, key=int)) or "none"
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise NotFound(f"no {wanted}", where=str(directory), fix=f"steps here: {steps}")
    passed = []
    for found in candidates:
        try:
            state = read(found.path)
        except Corrupt as error:
            passed.append(f"{error.where}: {error.what}")
            continue
        if belongs is None or belongs(state.cursor, state.chain):
            return Loaded(state, found, "; ".join(passed))
        passed.append(f"{found.path}: the log does not have its entry {state.cursor}")
    raise Corrupt("no usable checkpoint: " + "; ".join(passed), where=str(directory), fix="restore one from a copy")


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
    doomed = [each.path for each in _named(directory) if _age(each) < _age(oldest) and each.path not in spared]
    for path in doomed:
        hidden = path.rename(path.with_name(f"{_TEMPORARY}{path.name}"))  # half deleted must not look whole
        shutil.rmtree(hidden)
    return doomed


def cursor_of(path: Path) -> int:
    """The last log entry that this checkpoint has consumed; its tensors are not read. Raises Corrupt."""
    return int(facts_of(path)["cursor"])


def facts_of(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint but its tensors, as `CheckpointState` names it. Raises Corrupt."""
    try:
        facts = json.loads((path / _FACTS).read_bytes())
        digest = facts.pop("digest")
        if digest == _digest(facts) and facts["format"] == _FORMAT:
            return dict(facts)
    except FileNotFoundError:
        raise _corrupt(path / _FACTS, "missing") from None
    except (ValueError, AttributeError, KeyError, TypeError):
        pass
    raise _corrupt(path / _FACTS, "does not check out, or is of another version")


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


def _write(directory: Path, state: CheckpointState, ranks: Ranks) -> None:
    """All files of a checkpoint, each on the disk, and then the directory."""
    share, files = share_of(state), dict[str, Blob]()
    if sharded := shards.are_sharded(share):
        files = shards.write(share, directory, ranks)
    ranks.decided(lambda: _write_rest(directory, state, ("rng",) if sharded else _TENSORS, files))


def _write_rest(directory: Path, state: CheckpointState, names: tuple[str, ...], files: dict[str, Blob]) -> None:
    for name in names:
        path = directory / f"{name}.safetensors"
        save_tensors(getattr(state, name), path)
        fsync(path)
        files[path.name] = Blob.of(path)
    facts = {each.name: getattr(state, each.name) for each in fields(state) if each.name not in _TENSORS}
    facts |= {"format": _FORMAT, "files": {name: blob.model_dump() for name, blob in files.items()}}
    path = directory / _FACTS
    with naming(path):
        path.write_text(json.dumps(facts | {"digest": _digest(facts)}, indent=1, allow_nan=False))
    fsync(path)
    fsync(directory)


def _verified(path: Path) -> dict[str, Any]:
    """checkpoint.json, after checking it and every file it names. Raises Corrupt."""
    facts = facts_of(path)
    for name, expected, actual in _read_again(path, facts["files"]):
        if actual is None:
            raise _corrupt(path / name, "missing")
        if actual.model_dump() != expected:
            raise _corrupt(path / name, f"digest {actual.sha256}, {actual.size} bytes; expected {expected}")
    return facts


def _read_again(path: Path, files: dict[str, Any]) -> Iterator[tuple[str, Any, Blob | None]]:
    """Each file's name, what it was and what it is; several at a time, for shards may be many and large."""

    def blob(name: str) -> Blob | None:
        try:
            return Blob.of(path / name)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor() as pool:
        for (name, expected), actual in zip(files.items(), pool.map(blob, files), strict=True):
            yield name, expected, actual


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _corrupt(file: Path, what: str) -> Corrupt:
    others = [each.path.name for each in list_whole(file.parent.parent) if each.path != file.parent]
    fix = f"try {others[0]}" if others else "there is no other checkpoint here; restore one from a copy"
    return Corrupt(what, where=str(file), fix=fix)


def _sizes_fit(path: Path) -> bool:
    """The cheap half of `_verified`."""
    try:
        files = json.loads((path / _FACTS).read_bytes())["files"]
        return all((path / name).stat().st_size == blob["size"] for name, blob in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _clear_leftovers(directory: Path, token: int) -> None:
    """Delete what a killed `save` or `prune` left; not the work in progress of a newer writer."""
    for path in directory.glob(f"{_TEMPORARY}*"):
        match = _NAME.fullmatch(path.name.removeprefix(_TEMPORARY))
        if match and int(match[2]) <= token:
            shutil.rmtree(path, ignore_errors=True)


def _named(directory: Path) -> list[Found]:
    """Every directory with a checkpoint's name, newest first."""
    matches = [(path, _NAME.fullmatch(path.name)) for path in directory.glob("step-*") if path.is_dir()]
    return sorted((Found(int(m[1]), int(m[2]), path) for path, m in matches if m), key=_age, reverse=True)


def _age(found: Found) -> tuple[int, int]:
    """Rises with time; see the module's docstring for why the token comes first."""
    return found.token, found.step


def _refuse_if_fenced(directory: Path, token: int) -> None:
    newest = max((found.token for found in _named(directory)), default=0)
    if newest > token:
        raise Fenced(
            f"a learner with token {newest} saves here, ours is {token}",
            where=str(directory),
            fix="stop this process; the newer one goes on",
        )
