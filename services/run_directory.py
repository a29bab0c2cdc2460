"""A run's files, read from outside: who serves it, its ledger audited in full, its policies."""

import json
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from sapo_learner.archive import Archive
from sapo_learner.control import GROUP
from sapo_learner.errors import ConfigError, NotFound
from sapo_learner.ledger import Ledger, LedgerReport, audit, epoch_coverage
from services.runstore import EmbeddedRedis, RunStore
from services.runtime.settings import Environment, RunConfig, load_config
from services.tasks import build

if TYPE_CHECKING:
    from sapo_learner.policy import Policy

SERVICES_FILE = "services.json"


@dataclass(frozen=True)
class LocalServices:
    """Where the processes of a `sapo up` listen, and its token; mode 0600."""

    supervisor_pid: int
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
    services = LocalServices(**json.loads(path.read_text()))
    return services if psutil.pid_exists(services.supervisor_pid) else None


def run_config(directory: Path) -> RunConfig:
    """The resolved configuration that the run was started with."""
    path = directory / "run.yaml"
    if not path.is_file():
        raise NotFound("no run.yaml there", where=str(directory), fix="give a run's directory, such as runs/demo")
    return load_config(path)


async def audit_run(directory: Path) -> LedgerReport:
    """Hold the newest checkpoint's ledger against archive, Redis and draws, each counted one by one (I1)."""
    from sapo_learner import checkpoint

    config = run_config(directory)
    async with AsyncExitStack() as stack:
        services = live_services(directory)
        if services:
            url = services.redis_url
        elif external := Environment().redis_url.get_secret_value():
            url = external
        elif (directory / "redis").is_dir():
            url = await stack.enter_async_context(EmbeddedRedis(directory / "redis"))
        else:
            raise NotFound("no Redis of a run there", where=str(directory), fix="set SAPO_REDIS_URL to the run's Redis")
        store = await stack.enter_async_context(await RunStore.connect(url, config.run.name))
        try:
            newest = checkpoint.load_newest(directory / "checkpoints").state
            ledger, cursor = Ledger.from_dict(newest.ledger), newest.cursor
        except NotFound:
            ledger, cursor = Ledger(), 0
        # Entries move from Redis to the archive while we look: the later look at the archive misses nothing, and what
        # is in both counts once, as archived.
        state = await store.state()
        streamed = await store.read(0, state.unread_entries) if state.unread_entries else []
        archive = Archive(directory / "archive", None)
        draws, archived, last = [], 0, 0
        for entry in archive.entries():
            if entry.sequence <= state.sequence:
                draws += [entry.draw] if entry.kind == GROUP else []
                archived += entry.sequence > cursor
                last = entry.sequence
        unread = [entry for entry in streamed if last < entry.sequence <= state.sequence]
        draws += [entry.draw for entry in unread if entry.kind == GROUP]
        open_draws = {lease.draw for lease in state.leases} | state.reoffered
        report = audit(
            ledger, cursor=cursor, accepted=state.sequence, archived=archived, streamed=len(unread), draws=draws,
            open_draws=open_draws, next_draw=state.next_draw,
        )  # fmt: skip
        problems = build(config.task).problems("train")
        report.problems.extend(epoch_coverage(draws, len(problems), next_draw=state.next_draw, open_draws=open_draws))
        return report


def load_any_policy(name: str) -> tuple["Policy", RunConfig | None]:
    """POLICY: a run directory (newest checkpoint), RUN@STEP, or a model directory. With the run's configuration."""
    from sapo_learner import checkpoint
    from sapo_learner.policy import load_policy, load_weights

    where, _, step = name.partition("@")
    directory = Path(where)
    if (directory / "config.json").is_file():
        return load_policy(directory), None
    if not (directory / "checkpoints").is_dir():
        raise NotFound(
            "neither a run directory with checkpoints nor a model directory", where=name,
            fix="give runs/NAME, runs/NAME@STEP or a Hugging Face model directory",
        )  # fmt: skip
    if step and not step.isdigit():
        raise ConfigError(f"{step!r} is not a step number", where=name, fix="for example runs/demo@100")
    state = checkpoint.load_newest(directory / "checkpoints", int(step) if step else None).state
    policy = load_policy(directory / "model", weights=False)
    load_weights(policy, state.model)
    return policy, run_config(directory)
