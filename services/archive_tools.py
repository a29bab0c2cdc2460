"""`sapo archive RUN` and `sapo skip RUN ENTRY`: a run's archive looked into, shortened, and corrected by hand."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sapo_learner import skips
from sapo_learner.advantages import WHOLE_STEP, Vector, step_advantages
from sapo_learner.archive import Archive, Entry
from sapo_learner.checkpoint_facts import cursor_of
from sapo_learner.checkpoint_names import list_whole
from sapo_learner.control import GROUP
from sapo_learner.errors import ConfigError, InvalidTrajectory, Mismatch, NotFound
from sapo_learner.steps import Step, beginning, steps
from sapo_learner.trajectory import Trajectory, TrajectoryGroup
from services.wire import decode

_SKIPS_SHOWN = "skipped"


def stats(directory: Path) -> dict[str, Any]:
    """What the archive holds and what it takes; one frame in memory at a time. `pruned`: what it held before."""
    archive, counts = open_archive(directory), _Counts()
    segments = []
    for segment in archive.segments():
        first, last, after = None, None, (segment.first or 1) - 1
        for entry in archive.entries(after) if segment.first else ():
            if entry.sequence > (segment.last or 0):
                break
            first, last = first or entry.id, entry.id
            counts.add(entry)
        facts = {"name": segment.path.name, "token": segment.name.token, "bytes": segment.bytes}
        segments.append(facts | {"first": first, "last": last})
    pruned, size = archive.pruned, archive.size_bytes
    gone = {"through": pruned.head.id, "groups": sum(1 for _ in pruned.draws()), "controls": pruned.controls}
    return {
        **counts.to_dict(),
        "bytes": size,
        "compression": counts.payload_bytes / size if size else 0.0,
        "segments": segments,
        "pruned": gone if pruned.head.sequence else None,
        _SKIPS_SHOWN: skips.read(archive.directory),
    }


def show(directory: Path, wanted: str) -> dict[str, Any]:
    """One entry in full. wanted: an entry's id such as 1-57, or draw:57. Raises NotFound saying what there is."""
    archive = open_archive(directory)
    entry = find(archive, wanted)
    facts: dict[str, Any] = {"entry": entry.id, "kind": entry.kind, "chain": entry.chain, "bytes": len(entry.payload)}
    facts[_SKIPS_SHOWN] = skips.read(archive.directory).get(entry.id)
    if entry.kind != GROUP:
        return facts | {"content": json.loads(entry.payload)}
    try:
        group = decode(entry.payload)
    except InvalidTrajectory as error:
        return facts | {"draw": entry.draw, "invalid": str(error)}
    known = learned(directory, archive, entry, group)
    advantages = known.pop("advantages") or [None] * len(group.trajectories)
    return facts | known | _described(group, advantages, text_of(directory / "model"))


def prune(directory: Path) -> dict[str, Any]:
    """Delete what no kept checkpoint needs, that of step 0 aside. Raises Unavailable while a learner runs."""
    from sapo_learner import checkpoint

    archive_directory = _existing(directory)
    with skips.no_learner(archive_directory):
        archive = Archive(archive_directory, None)
        freed = archive.prune(checkpoint.oldest_cursor(directory / "checkpoints"))
        through = archive.pruned.head
    notes = "nothing is pruned: the oldest kept checkpoint needs the oldest segment, or there is only one segment"
    if through.sequence:
        notes = "the run can be resumed from every kept checkpoint, but no longer be replayed from step 0"
    return {"freed_bytes": freed, "pruned_through": through.id, "bytes": archive.size_bytes, "notes": notes}


def skip(directory: Path, entry_id: str, reason: str) -> None:
    """Take a group out of training before any checkpoint has consumed it.

    Raises NotFound for an entry that is not in the archive, Mismatch for one that cannot be skipped any more or is no
    group, Unavailable while a learner runs.
    """
    archive_directory = _existing(directory)

    def check() -> None:
        entry = find(Archive(archive_directory, None), entry_id, draws=False)
        if entry.kind != GROUP:
            raise Mismatch(f"entry {entry.id} is no group but of kind {entry.kind!r}", fix="only groups can be skipped")
        _refuse_if_consumed(directory / "checkpoints", entry)

    skips.add(archive_directory, entry_id, reason, check=check)


def _refuse_if_consumed(checkpoints: Path, entry: Entry) -> None:
    for found in list_whole(checkpoints):
        cursor = cursor_of(found.path)
        if cursor >= entry.sequence:
            raise Mismatch(
                f"checkpoint {found.path.name} has consumed entry {entry.id} already (its cursor is {cursor})",
                where=str(checkpoints),
                fix="a replay would no longer give the run's weights; to undo it, move away that checkpoint and all "
                "others behind the entry, and go on from an older one",
            )


class _Counts:
    """Added up over the entries. tokens: of responses, masked ones included."""

    def __init__(self) -> None:
        self.entries = self.groups = self.controls = self.invalid = self.responses = self.tokens = 0
        self.payload_bytes = 0
        self._reward = 0.0
        self._generations, self._workers = set[int](), Counter[str]()
        self._draws: tuple[int, int] | None = None

    def add(self, entry: Entry) -> None:
        self.entries += 1
        self.payload_bytes += len(entry.payload)
        self._generations.add(entry.generation)
        if entry.kind != GROUP:
            self.controls += 1
            return
        self.groups += 1
        low, high = self._draws or (entry.draw, entry.draw)
        self._draws = min(low, entry.draw), max(high, entry.draw)
        try:
            group = decode(entry.payload)
        except InvalidTrajectory:
            self.invalid += 1
            return
        self._workers[group.worker] += 1
        self.responses += len(group.trajectories)
        self.tokens += sum(len(each.token_ids) for each in group.trajectories)
        self._reward += sum(each.reward for each in group.trajectories)

    def to_dict(self) -> dict[str, Any]:
        names = ("entries", "groups", "controls", "invalid", "responses", "tokens", "payload_bytes")
        return {name: getattr(self, name) for name in names} | {
            "first_draw": self._draws[0] if self._draws else None,
            "last_draw": self._draws[1] if self._draws else None,
            "generations": sorted(self._generations),
            "groups_per_worker": dict(sorted(self._workers.items())),
            "mean_reward": self._reward / self.responses if self.responses else None,
        }


def _existing(directory: Path) -> Path:
    archive = directory / "archive"
    if not archive.is_dir():
        raise NotFound("no archive there", where=str(directory), fix="give a run's directory, such as runs/demo")
    return archive


def open_archive(directory: Path) -> Archive:
    """That of a run's directory, to be read. Raises NotFound when there is none."""
    return Archive(_existing(directory), None)


def find(archive: Archive, wanted: str, *, draws: bool = True) -> Entry:
    """The entry with this id, or that answers this draw. Raises ConfigError for what is neither, NotFound saying what
    there is."""
    by_id, by_draw = re.fullmatch(r"(\d+)-(\d+)", wanted), re.fullmatch(r"draw:(\d+)", wanted)
    if by_id:
        return _by_id(archive, wanted, int(by_id[2]))
    if by_draw and draws:
        return _by_draw(archive, int(by_draw[1]))
    known = "an entry's id such as 1-57" + (", or a draw such as draw:57" if draws else "")
    raise ConfigError("not an entry", where=wanted, fix=f"give {known}")


def _by_id(archive: Archive, wanted: str, sequence: int) -> Entry:
    begin = archive.pruned.head
    if 1 <= sequence <= begin.sequence:
        raise _missing(archive, wanted, f"the archive was pruned up to entry {begin.id}")
    found = archive.read(sequence - 1, 1) if sequence else []
    if not found or found[0].id != wanted:
        raise _missing(archive, wanted, f"its place is taken by {found[0].id}" if found else "no such entry")
    return found[0]


def _by_draw(archive: Archive, draw: int) -> Entry:
    begin = archive.pruned
    for entry in archive.entries(begin.head.sequence):
        if entry.draw == draw:
            return entry
    what = f"pruned with all up to entry {begin.head.id}" if begin.holds(draw) else "no entry answers it"
    raise _missing(archive, f"draw {draw}", what)


def _missing(archive: Archive, wanted: str, what: str) -> NotFound:
    head, first = archive.head, archive.pruned.head.sequence + 1
    there = f"entries {first} to {head.sequence}, the last being {head.id}" if first <= head.sequence else "no entry"
    fix = f"the archive holds {there}; a live run's newest ones may still stand in Redis"
    return NotFound(what, where=wanted, fix=fix)


def learned(directory: Path, archive: Archive, entry: Entry, group: TrajectoryGroup) -> dict[str, Any]:
    """The group's step, the estimator there, and its advantages; None where `advantages_note` says why."""
    step, note = step_of(directory, archive, entry)
    found: Vector | None = None
    if step and not step.missing:
        found = step.advantages(decode, skips.read(archive.directory)).get(entry.id)
        if found is None:
            note = "training left it out: it was skipped, or too old for training.max_policy_age"
    elif step and step.settings.advantages.estimator not in WHOLE_STEP:  # the group alone decides
        (found,) = step_advantages([group], step.settings.advantages)
    return {
        "step": step.number if step else None,
        "estimator": step.settings.advantages.estimator if step else None,
        "advantages": None if found is None else found.tolist(),
        "advantages_note": note,
    }


def step_of(directory: Path, archive: Archive, entry: Entry) -> tuple[Step | None, str]:
    """The step that the entry belongs to, and what is not there of it."""
    begin = beginning(directory / "checkpoints", archive, entry.sequence)
    if begin is None:
        return None, "no checkpoint from before this entry is kept, so its step is not known"
    for step in steps(archive, begin):
        if step.entries[-1].sequence >= entry.sequence:
            there = len(step.entries)
            note = f"step {step.number} is not complete: {there} of its {there + step.missing} groups are archived"
            return step, note if step.missing else ""
    return None, "the run had done its last step before this entry"


def _described(
    group: TrajectoryGroup, advantages: Sequence[float | None], text: Callable[[list[int]], str | None]
) -> dict[str, Any]:
    names = ("draw", "attempt", "task", "prompt_id", "epoch", "seed", "worker", "engine", "traceparent")
    prompt, sampling = group.prompt_ids.tolist(), group.sampling
    sampled = {
        name: getattr(sampling, name) for name in ("temperature", "max_tokens", "top_p", "top_k", "logprob_mode")
    }
    return {name: getattr(group, name) for name in names} | {
        "prompt": {"tokens": prompt, "text": text(prompt)},
        "sampling": sampled,
        "responses": [
            _response(each, advantage, text) for each, advantage in zip(group.trajectories, advantages, strict=True)
        ],
    }


def _response(each: Trajectory, advantage: float | None, text: Callable[[list[int]], str | None]) -> dict[str, Any]:
    tokens = each.token_ids.tolist()
    return {
        "text": text(tokens),
        "rewards": dict(each.rewards),
        "reward": each.reward,
        "advantage": advantage,
        "finish_reason": each.finish_reason,
        "spans": [{"length": span.length, "version": span.version, "step": span.step} for span in each.spans],
        "tokens": tokens,
        "logprobs": each.behaviour_logprobs.tolist(),
        "loss_mask": each.loss_mask.tolist(),
    }


def text_of(model: Path) -> Callable[[list[int]], str | None]:
    """Token ids -> text by the run's tokenizer, special tokens included; None where it is not there."""
    if not (model / "tokenizer_config.json").is_file():
        return lambda _: None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    return lambda ids: str(tokenizer.decode(ids))
