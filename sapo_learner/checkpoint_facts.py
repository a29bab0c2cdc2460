"""checkpoint.json: everything of a checkpoint but its tensors, checked; and the newest one that is whole. No torch."""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sapo_learner import formats
from sapo_learner.checkpoint_names import FACTS, Found, list_whole, named
from sapo_learner.errors import Corrupt, NotFound
from sapo_learner.manifest import Blob

T = TypeVar("T")


def newest(
    directory: Path,
    step: int | None,
    read: Callable[[Path], T],
    belongs: Callable[[T], bool] = lambda _: True,
) -> tuple[T, Found, str]:
    """The newest checkpoint (of `step`, if given) that is whole, where it is, and why newer ones were passed over.

    read: raises Corrupt for one that is not whole. belongs: whether the log has what it has consumed. Raises NotFound
    when there is no checkpoint, Corrupt when none can be used.
    """
    candidates = [found for found in named(directory) if step is None or found.step == step]
    if not candidates:
        steps = ", ".join(sorted({str(found.step) for found in named(directory)}, key=int)) or "none"
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise NotFound(f"no {wanted}", where=str(directory), fix=f"steps here: {steps}")
    passed = []
    for found in candidates:
        try:
            state = read(found.path)
        except Corrupt as error:
            passed.append(f"{error.where}: {error.what}")
            continue
        if belongs(state):
            return state, found, "; ".join(passed)
        passed.append(f"{found.path}: the log does not have its entry {cursor_of(found.path)}")
    raise Corrupt("no usable checkpoint: " + "; ".join(passed), where=str(directory), fix="restore one from a copy")


def facts_of(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint but its tensors, as `CheckpointState` names it.

    Raises Corrupt, and Mismatch for a whole one of another version: passing it over would undo steps.
    """
    try:
        facts = json.loads((path / FACTS).read_bytes())
        digest = facts.pop("digest")
        if digest == digest_of(facts):
            formats.CHECKPOINT.check(facts["format"], where=str(path / FACTS))
            return dict(facts)
    except FileNotFoundError:
        raise corrupt(path / FACTS, "missing") from None
    except (ValueError, AttributeError, KeyError, TypeError):
        pass
    raise corrupt(path / FACTS, "does not check out")


def cursor_of(path: Path) -> int:
    """The last log entry that this checkpoint has consumed; its tensors are not read. Raises Corrupt."""
    return int(facts_of(path)["cursor"])


def verified(path: Path) -> dict[str, Any]:
    """checkpoint.json, after checking it and every file it names. Raises Corrupt."""
    facts = facts_of(path)
    for name, expected, actual in _read_again(path, facts["files"]):
        if actual is None:
            raise corrupt(path / name, "missing")
        if actual.model_dump() != expected:
            raise corrupt(path / name, f"digest {actual.sha256}, {actual.size} bytes; expected {expected}")
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


def digest_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def corrupt(file: Path, what: str) -> Corrupt:
    others = [each.path.name for each in list_whole(file.parent.parent) if each.path != file.parent]
    fix = f"try {others[0]}" if others else "there is no other checkpoint here; restore one from a copy"
    return Corrupt(what, where=str(file), fix=fix)
