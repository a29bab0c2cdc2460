"""A run's files, read from outside: who serves it, its ledger audited in full, its policies."""

import json
import logging
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil

from sapo_learner.archive import Archive, Entry
from sapo_learner.checkpoint_facts import newest, verified
from sapo_learner.control import GROUP
from sapo_learner.errors import ConfigError, Corrupt, NotFound
from sapo_learner.ledger import Ledger, LedgerReport, audit, epoch_coverage
from sapo_learner.pruned import Pruned
from services.control_plane.evaluation_parts import shown
from services.control_plane.record import read
from services.control_plane.sampler import Mixture
from services.preflight import check_model
from services.runstore import EmbeddedRedis, RunStore
from services.runtime.client import ControlPlaneClient
from services.runtime.settings import Environment, RunConfig, load_config
from services.tasks import build_all

if TYPE_CHECKING:
    from sapo_learner.policy import Policy

log = logging.getLogger(__name__)
SERVICES_FILE = "services.json"
PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class LocalServices:
    """Where the processes of a `sapo up` listen, and its token; mode 0600."""

    supervisor_pid: int
    supervisor_started: float  # Unix time
    control_plane_url: str
    ingest_address: str
    redis_url: str
    token: str
    processes: dict[str, dict[str, Any]]  # name -> pid, http

    def write(self, directory: Path) -> None:
        path = directory / SERVICES_FILE
        with open(os.open(path.with_suffix(".tmp"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(self.__dict__, file, indent=2)
        os.replace(path.with_suffix(".tmp"), path)


def live_services(directory: Path) -> LocalServices | None:
    """The services of the `sapo up` that runs on this directory now, if one does."""
    path = directory / SERVICES_FILE
    if not path.is_file():
        return None
    try:
        services = LocalServices(**json.loads(path.read_text()))
        started = psutil.Process(services.supervisor_pid).create_time()
    except (ValueError, TypeError) as error:
        raise Corrupt(
            f"not what `sapo up` writes there: {error}", where=str(path),
            fix="remove it, if no `sapo up` runs on this directory",
        ) from None  # fmt: skip
    except psutil.Error:
        return None
    # Process ids come round again, in containers at once: the same process has the same start.
    return services if abs(started - services.supervisor_started) < 1 else None


def forget_services(directory: Path) -> None:
    """Remove what this process wrote, and no other's."""
    services = live_services(directory)
    if services and services.supervisor_pid == os.getpid():
        (directory / SERVICES_FILE).unlink(missing_ok=True)


def run_config(directory: Path) -> RunConfig:
    """The resolved configuration that the run was started with."""
    path = directory / "run.yaml"
    if not path.is_file():
        raise NotFound("no run.yaml there", where=str(directory), fix="give a run's directory, such as runs/demo")
    return load_config(path)


def stopped_status(directory: Path) -> dict[str, Any]:
    """What `status` tells of a run that nobody serves, from its record: the fields that still mean something."""
    config = run_config(directory)
    last: dict[str, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    for line in read(directory / "record.jsonl"):
        last[line["kind"]] = line
        if line["kind"] == "evaluation":
            evaluations[line["step"]] = shown(line)
    step = last.get("step", {}).get("step", 0)
    finished = step >= config.training.steps and config.training.steps in evaluations
    return {
        "run": config.run.name,
        "state": "finished" if finished else "stopped",
        "steps": config.training.steps,
        "step": step,
        "last_step": last.get("step"),
        "evaluations": list(evaluations.values()),
        "unscored": last.get("unscored"),
        "workers": [],
    }


def set_aside(directory: Path) -> Path:
    """Move a run's directory out of the way, to the first free NAME.N; returns the new place."""
    number = 1
    while (target := directory.with_name(f"{directory.name}.{number}")).exists():
        number += 1
    directory.rename(target)
    return target


async def audit_run(directory: Path) -> LedgerReport:
    """Hold the newest checkpoint's ledger against archive, Redis and draws, each counted one by one (I1)."""
    config = run_config(directory)
    async with AsyncExitStack() as stack:
        url = await _redis_url(directory, stack)
        store = await stack.enter_async_context(await RunStore.connect(url, config.run.name))
        try:
            facts, _, _ = newest(directory / "checkpoints", None, verified)
            ledger, cursor = Ledger.from_dict(facts["ledger"]), int(facts["cursor"])
        except NotFound:
            ledger, cursor = Ledger(), 0
        # Entries move from Redis to the archive while we look: the later look at the archive misses nothing, and what
        # is in both counts once, as archived.
        state = await store.state()
        streamed = await store.read(0, state.unread_entries) if state.unread_entries else []
        pruned, archived = _archived(directory / "archive")
        archived = [each for each in archived if each.sequence <= state.sequence]
        last = archived[-1].sequence if archived else pruned.head.sequence
        unread = [_Seen(entry) for entry in streamed if last < entry.sequence <= state.sequence]
        draws = [*pruned.draws(), *(each.draw for each in archived + unread if each.draw is not None)]
        open_draws = {lease.draw for lease in state.leases} | state.reoffered
        report = audit(
            ledger, cursor=cursor, accepted=state.sequence, archived=sum(each.sequence > cursor for each in archived),
            streamed=len(unread), draws=draws, open_draws=open_draws, next_draw=state.next_draw,
        )  # fmt: skip
        report.problems.extend(_epochs(config, draws, open_draws, state.next_draw))
        return report


def _epochs(config: RunConfig, draws: Iterable[int], open_draws: Iterable[int], next_draw: int) -> Iterator[str]:
    """What keeps the plain sampler's promise from being kept, task by task."""
    mixture, tasks = Mixture(config.mixture, config.training.groups_per_step), build_all(config.mixture)
    places = [_by_task(mixture, each) for each in (draws, open_draws, range(next_draw))]
    for index, (label, task) in enumerate(tasks.items()):
        taken, still_open, handed_out = (each[index] for each in places)
        prompts = len(task.prompts("train"))
        for problem in epoch_coverage(taken, prompts, next_draw=len(handed_out), open_draws=still_open):
            yield f"task {label}: {problem}" if len(tasks) > 1 else problem


def _by_task(mixture: Mixture, draws: Iterable[int]) -> dict[int, list[int]]:
    """index of a task -> which of its draws are among `draws`."""
    places = defaultdict[int, list[int]](list)
    for draw in draws:
        index, place = mixture.locate(draw)
        places[index].append(place)
    return places


def _archived(directory: Path, tries: int = 3) -> tuple[Pruned, list["_Seen"]]:
    """What was pruned, and all entries behind it."""
    archive = Archive(directory, None)
    try:
        return archive.pruned, [_Seen(entry) for entry in archive.entries(archive.pruned.head.sequence)]
    except NotFound:  # a learner that runs has just pruned more
        if tries == 1:
            raise
        return _archived(directory, tries - 1)


class _Seen:
    """What the audit keeps of an entry: not its payload."""

    __slots__ = ("draw", "sequence")

    def __init__(self, entry: Entry) -> None:
        self.sequence = entry.sequence
        self.draw = entry.draw if entry.kind == GROUP else None


async def _redis_url(directory: Path, stack: AsyncExitStack) -> str:
    """The run's Redis: the one that serves it, the external one, or the embedded one, started for the while."""
    services = live_services(directory)
    if services:
        return services.redis_url
    if external := Environment().redis_url.get_secret_value():
        return external
    if (directory / "redis").is_dir():
        return await stack.enter_async_context(EmbeddedRedis(directory / "redis"))
    raise NotFound("no Redis of a run there", where=str(directory), fix="set SAPO_REDIS_URL to the run's Redis")


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def require_url(address: str) -> None:
    """ConfigError when no request can be sent there."""
    try:
        parts = urlsplit(address)
        whole = bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if not whole:
        raise ConfigError("not http://HOST:PORT", where=address, fix="for example http://127.0.0.1:8080")


async def load_any_policy(name: str) -> tuple["Policy", RunConfig | None]:
    """POLICY: a run (its newest policy), RUN@STEP, or a model directory. With the run's configuration.

    Of a directory, checkpoints are read; of a control plane's URL, published snapshots.
    """
    where, _, step = name.rpartition("@") if re.search(r"@\d*$", name) else (name, "", "")
    if is_url(where):
        require_url(where)
        return await _published_policy(where, int(step) if step else None)
    return _policy_on_disk(name, Path(where), step)


async def _published_policy(url: str, step: int | None) -> tuple["Policy", RunConfig]:
    from sapo_learner.policy import load_policy, load_weights
    from sapo_learner.snapshot import read_snapshot

    environment = Environment()
    async with ControlPlaneClient(
        url, environment.credential(), tls=environment.tls, patience=PATIENCE_SECONDS
    ) as control:
        config = await control.config()
        version = None
        if step is not None:
            versions = await control.versions()
            version = next((number for number, of_step in sorted(versions.items()) if of_step == step), None)
            if version is None:
                kept = ", ".join(str(each) for each in sorted(versions.values()))
                raise NotFound(f"no published policy of step {step}", where=url, fix=f"kept are steps {kept}")
        manifest = await control.manifest(version)
        with tempfile.TemporaryDirectory(prefix="sapo-policy-") as scratch:
            paths = {blob.sha256: await control.download(blob, Path(scratch)) for blob in manifest.blobs()}
            for file_name, blob in manifest.files.items():
                shutil.copyfile(paths[blob.sha256], Path(scratch) / file_name)
            policy = load_policy(Path(scratch), weights=False)
            load_weights(policy, read_snapshot(manifest, paths.__getitem__))
    return policy, config


def _policy_on_disk(name: str, directory: Path, step: str) -> tuple["Policy", RunConfig | None]:
    from sapo_learner import checkpoint
    from sapo_learner.policy import load_policy
    from sapo_learner.resume import load_state
    from services.learner.base_policy import shaped_policy

    if (directory / "config.json").is_file():
        check_model(directory, where=f"policy {directory}")
        return load_policy(directory), None
    if not any((directory / "checkpoints").glob("step-*")):
        raise NotFound(
            "neither a run directory with checkpoints nor a model directory", where=name,
            fix="give runs/NAME, runs/NAME@STEP, a control plane's URL or a Hugging Face model directory",
        )  # fmt: skip
    config = run_config(directory)
    policy = shaped_policy(directory, config)  # first: a run that goes on may prune the checkpoint
    loaded = checkpoint.load_newest(directory / "checkpoints", int(step) if step else None)
    if loaded.reason:
        log.warning("passed over: %s; the policy of step %d is taken", loaded.reason, loaded.state.step)
    load_state(policy, loaded.state, where=str(loaded.found.path))
    return policy.merged(), config
