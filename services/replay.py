"""`sapo replay RUN`: the learner once more, from a checkpoint and the archive alone; no service, no inference server.

The same log gives the same weights (I3): every published policy and every kept checkpoint that is passed on the way is
compared. Where the environment is the run's own, digests must be equal, bit for bit. On another machine, build or
number of threads the last bits may differ: then kept checkpoints are compared to a tolerance, and that is said.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapo_learner.archive import Archive, Entry
from sapo_learner.control import GROUP
from sapo_learner.errors import Corrupt, Mismatch, NotFound
from services.control_plane.record import read
from services.run_directory import run_config
from services.runtime.settings import RunConfig

if TYPE_CHECKING:
    from sapo_learner.checkpoint import CheckpointState, Found
    from sapo_learner.learner import Learner

TOLERANCE = 1e-3
"""Largest relative difference of any tensor, in the L2 norm, that another machine's arithmetic may make."""


@dataclass
class Replayed:
    """from_step, step: where the replay began and how far it came. digest: of the weights there (float32).

    published, checkpoints: steps whose policy was compared. largest_difference: relative, over compared checkpoints.
    """

    run: str
    from_step: int
    step: int
    digest: str = ""
    bit_exact: bool = True
    because: str = ""
    """Why equality to the last bit cannot be asked for; empty where it is."""
    published: list[int] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    largest_difference: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sentence(self) -> str:
        compared = f"{len(self.published)} published policies and {len(self.checkpoints)} checkpoints"
        how = "equal, bit for bit" if self.bit_exact else f"within {TOLERANCE:g} ({self.because})"
        verdict = f"{compared} on the way are {how}" if self.published or self.checkpoints else "nothing was compared"
        return f"run {self.run}, steps {self.from_step} to {self.step}: {verdict}; weights {self.digest}"


def replay(
    directory: Path,
    *,
    start: int = 0,
    until: int | None = None,
    verify: bool = True,
    out: Path | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Replayed:
    """Train again from the checkpoint of step `start` to the end of the archive, or to step `until`.

    verify: compare on the way. out: where the final policy is written, as a model directory. progress: told step and
    last step. Raises NotFound for a checkpoint that is not kept, Mismatch naming the first step that differs or a file
    of the user's own that is no longer what the run was trained with.
    """
    from sapo_learner import checkpoint, skips
    from sapo_learner.policy import write_policy
    from sapo_learner.reference import DIRECTORY as REFERENCE
    from sapo_learner.resume import environment_of, revived
    from sapo_learner.snapshot import weights_digest
    from sapo_learner.train import train
    from services.learner.base_policy import shaped_policy
    from services.wire import decode

    config = run_config(directory)
    with _arithmetic(config):
        loaded = checkpoint.load_newest(directory / "checkpoints", start)
        policy, where = shaped_policy(directory, config), str(loaded.found.path)
        log = ArchivedLog(directory / "archive")
        _require_own_parts(directory, log, loaded.state, where)
        learner, position = revived(
            policy, loaded.state, temperature=config.sampling.temperature, where=where,
            reference_directory=directory / REFERENCE,
        )  # fmt: skip
        because = _difference(environment_of(learner), loaded.state.environment)
        report = Replayed(config.run.name, start, start, bit_exact=not because, because=because)
        truth = _Truth(directory, config, report)
        last = config.training.steps if until is None else until
        for step in _up_to(
            until, learner, train(learner, log, position, decode=decode, skips=skips.read(directory / "archive"))
        ):
            report.step = step.update.step
            if verify:
                truth.compare(learner)
            progress(report.step, last)
        if until is None:
            truth.refuse_short(report.step)
        report.digest = weights_digest(learner.policy.tensors())
        if out is not None:
            write_policy(learner.policy.merged(), out)
    return report


def _require_own_parts(directory: Path, log: "ArchivedLog", state: "CheckpointState", where: str) -> None:
    """Files of the user's own must be what the log says last; what it says they were before, is kept beside it."""
    from sapo_learner import pins
    from sapo_learner.control import last_settings
    from sapo_learner.resume import settings_in

    pins.recall(directory)
    controls = log.controls(state.cursor, anywhere=True)
    pins.require_current(last_settings(controls, settings_in(state, where=where)), directory)


def _up_to(until: int | None, learner: "Learner", steps: Iterator[Any]) -> Iterator[Any]:
    while until is None or learner.step_count < until:
        step = next(steps, None)
        if step is None:
            if until is not None:
                raise NotFound(
                    f"the archive ends at step {learner.step_count}",
                    where=f"step {until}",
                    fix="give a smaller --until",
                )
            return
        yield step


@contextmanager
def _arithmetic(config: RunConfig) -> Iterator[None]:
    """Threads and kernels as the run's learner had them."""
    import torch

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(config.training.threads)
    torch.use_deterministic_algorithms(config.training.deterministic)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    differing = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
    if differing:
        return "; ".join(f"{key} is {ours.get(key)}, was {theirs.get(key)}" for key in sorted(differing))
    return "" if ours["deterministic"] else "training.deterministic is false"


class _Truth:
    """What the run made of each step: digests of what it published, and the checkpoints that are still kept."""

    def __init__(self, directory: Path, config: RunConfig, report: Replayed) -> None:
        from sapo_learner import checkpoint

        self._config, self._report = config, report
        # A step that was taken again after a restore was published again; equal weights have equal digests.
        self._published: dict[int, set[str]] = {}
        self._done = 0  # steps that the run is known to have done
        for line in read(directory / "record.jsonl"):
            if line["kind"] == "step":
                self._done = max(self._done, line["step"])
            if line["kind"] == "policy":
                self._published.setdefault(line["step"], set()).add(line["digest"])
        self._checkpoints: dict[int, Found] = {}
        for found in reversed(checkpoint.list_whole(directory / "checkpoints")):
            self._checkpoints[found.step] = found  # the newest of a step wins

    def refuse_short(self, step: int) -> None:
        done = max(self._done, *self._checkpoints, 0)
        if step < done:
            raise Corrupt(
                f"the archive ends at step {step}, but the run went to step {done}", where=self._config.run.name,
                fix="restore the archive from a copy; `--until` replays a part",
            )  # fmt: skip

    def compare(self, learner: "Learner") -> None:
        from sapo_learner.snapshot import snapshot_digest

        step, tensors = learner.step_count, learner.policy.tensors()
        known = self._published.get(step)
        if known and self._report.bit_exact:
            digest = snapshot_digest(tensors, self._config.policy.dtype)
            if digest not in known:
                raise _differs(step, f"digest {digest[:12]}, published was {', '.join(d[:12] for d in sorted(known))}")
            self._report.published.append(step)
        if step in self._checkpoints:
            self._compare_weights(step, learner.policy.state())

    def _compare_weights(self, step: int, tensors: Any) -> None:
        from sapo_learner import checkpoint

        kept = checkpoint.load(self._checkpoints[step].path).model
        for name, tensor in tensors.items():
            ours, theirs = tensor.detach().cpu().double(), kept[name].double()
            difference = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))
            if difference > (0.0 if self._report.bit_exact else TOLERANCE):
                raise _differs(step, f"tensor {name!r} differs by {difference:.1e} from checkpoint {step}")
            self._report.largest_difference = max(self._report.largest_difference, difference)
        self._report.checkpoints.append(step)


def _differs(step: int, how: str) -> Mismatch:
    fix = "it is the first step that does; was the archive or a checkpoint altered?"
    return Mismatch(f"the replay differs from the run: {how}", where=f"step {step}", fix=fix)


class ArchivedLog:
    """The archive as a log that is all there; asked for more than it holds, it says stop."""

    def __init__(self, directory: Path) -> None:
        self._archive = Archive(directory, None)

    def next(self, after: int, count: int) -> list[Entry] | None:
        entries = self._archive.read(after, count)
        return entries if len(entries) == count else None

    def controls(self, after: int, *, anywhere: bool = False) -> list[Entry]:
        entries = self._archive.entries(after)
        if anywhere:
            return [entry for entry in entries if entry.kind != GROUP]
        return list(takewhile(lambda entry: entry.kind != GROUP, entries))
