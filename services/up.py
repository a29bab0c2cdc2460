"""The `sapo up` command: check, start, show, drain, report."""

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from sapo_learner.checkpoint_names import list_whole
from sapo_learner.errors import ConfigError, NotFound, Unavailable
from services import hub
from services.control_plane.record import read
from services.local import LocalRun
from services.preflight import check
from services.run_directory import (
    audit_run,
    live_services,
    load_any_policy,
    run_config,
    set_aside,
    stopped_status,
)
from services.runstore import RunStore
from services.runtime.changes import changes, check_changes
from services.runtime.settings import Environment, RunConfig
from services.summary import print_report, summarise, write_summary
from services.view import View

Report = Callable[[dict[str, Any]], None]


BEGUN_FROM = "begun-from.json"


async def up(
    config: RunConfig,
    console: Console,
    *,
    again: bool,
    start_from: str | None = None,
    back_to: int | None = None,
    report: Report | None = None,
) -> int:
    """Run to the end or until Ctrl-C; returns the exit code. Raises SapoError for what cannot be run.

    start_from: POLICY that a new run begins with, instead of policy.source. back_to: step of a kept checkpoint that
    this run goes on from, leaving what came after it. report: takes the closing report (of a run that was stopped: its
    status) instead of the console.
    """
    directory, given = config.run.directory, config.policy.source
    _refuse_second(directory)
    if console.is_terminal:  # importing torch takes its time
        console.print("checking the configuration ...", style="dim")
    if start_from:
        config = await _begin_with(start_from, config, again=again)
    elif not again:
        config = _as_it_began(config)
    config, named = hub.pinned(config, anew=again), config.policy
    await _prepare(config, console, again=again, back_to=back_to)
    hub.remember(config, named)
    await _fetch(config, console)
    run = LocalRun(config, workers=config.local.rollout_workers, back_to=back_to)
    if start_from:
        begun = {"policy": start_from, "source": config.policy.source, "instead_of": given}
        (directory / BEGUN_FROM).write_text(json.dumps(begun))
    console.print(f"run {config.run.name} in {directory}; logs in {directory}/logs", markup=False)
    if not await _carry_out(run, console):
        console.print("stopped; the same command goes on from here")
        if report:
            report(stopped_status(directory))
        return 0
    return await _close(config, console, report)


async def _prepare(config: RunConfig, console: Console, *, again: bool, back_to: int | None) -> None:
    """Check everything that can be known beforehand, and clear the way."""
    directory, remarks = config.run.directory, list[str]()
    check(config, remarks.append)
    if back_to is not None:
        _refuse_unkept(directory, back_to)
    await _make_way(config, directory, console, again=again, back=back_to is not None)
    for remark in remarks:
        console.print(f"note: {remark}", markup=False)


async def _fetch(config: RunConfig, console: Console) -> None:
    """Have the whole model here before anything starts, and show how far that is."""
    if not hub.on_hub(config.policy):
        return
    with console.status(f"looking for {config.policy.source} ...") as status:
        await asyncio.to_thread(hub.directory, config.policy, say=status.update)
    console.print(f"policy {config.policy.source}, commit {config.policy.revision}", markup=False)


async def _carry_out(run: LocalRun, console: Console) -> bool:
    """Start, show, drain; returns whether the run came to its end."""
    stop = _asked_to_stop(console)
    try:
        await run.start()
        with View(console) as draw:
            return await run.finished(stop, draw)
    finally:
        console.print("draining ...", style="dim")
        await run.stop()


async def _close(config: RunConfig, console: Console, report: Report | None) -> int:
    """Audit and summary of a run that came to its end; the exit code."""
    directory = config.run.directory
    audit = await audit_run(directory)
    summary = summarise(directory, seed=config.run.seed, ledger_balanced=audit.balanced)
    path = write_summary(directory, summary)
    print_report(console, summary, path)
    if report:
        report({"run": config.run.name, "state": "finished", "summary": str(path), **summary})
    return 0 if audit.balanced else 1


def _asked_to_stop(console: Console) -> asyncio.Event:
    """Set by Ctrl-C, by SIGTERM, and when the terminal is closed, which then gets no more output."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def hung_up() -> None:
        console.file = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, hung_up)
    return stop


async def _begin_with(name: str, config: RunConfig, *, again: bool) -> RunConfig:
    """Keep a copy of the policy beside the run's directory (named by its weights) and let it be the run's source.

    The same command once more goes on with what it began; raises ConfigError when the run began with another policy.
    """
    from sapo_learner.policy import write_policy
    from sapo_learner.snapshot import weights_digest

    policy, _ = await load_any_policy(name)
    directory = config.run.directory.resolve()
    source = directory.with_name(f"{directory.name}-from-{weights_digest(policy.tensors())[:12]}")
    if not again and _has_begun(directory) and run_config(directory).policy.source != str(source):
        raise ConfigError(
            f"--from {name} begins a new run, but this one has begun with another policy", where=str(directory),
            fix="leave --from out to go on, choose another run.name, or set the run aside with --again",
        )  # fmt: skip
    if not source.exists():
        source.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=source.parent, prefix=f".{source.name}-"))
        try:
            write_policy(policy, temporary)
            temporary.rename(source)  # whole, or not there
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return config.model_copy(
        update={"policy": config.policy.model_copy(update={"source": str(source), "revision": None})}
    )


def _as_it_began(config: RunConfig) -> RunConfig:
    """A run that began with --from goes on with its copy of that policy, also when the option is left out."""
    path = config.run.directory / BEGUN_FROM
    if not path.is_file():
        return config
    begun = json.loads(path.read_text())
    if config.policy.source != begun["instead_of"]:
        return config
    return config.model_copy(
        update={"policy": config.policy.model_copy(update={"source": begun["source"], "revision": None})}
    )


def _has_begun(directory: Path) -> bool:
    return (directory / "run.yaml").exists() and any(
        line["kind"] == "step" for line in read(directory / "record.jsonl")
    )


def _refuse_second(directory: Path) -> None:
    if live_services(directory):
        raise Unavailable(
            "another `sapo up` runs on this directory", where=str(directory),
            fix="stop it first (Ctrl-C there), or choose another run.name",
        )  # fmt: skip


def _steps_in_summary(directory: Path) -> int:
    """Steps of the finished run that a summary tells of; 0 when there is none that can be read."""
    try:
        return int(json.loads((directory / "summary.json").read_text())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


async def _make_way(config: RunConfig, directory: Path, console: Console, *, again: bool, back: bool = False) -> None:
    """Go on with an unfinished run, listing what has changed; a complete or another run needs --again.

    back: the run goes on from an earlier step, so that it is not complete, either.
    """
    _refuse_second(directory)
    if not (directory / "run.yaml").exists():
        return
    if not _has_begun(directory):
        if changes(run_config(directory), config):
            await _set_aside(config, directory, console)
        return
    done = max((int(line["step"]) for line in read(directory / "record.jsonl") if line["kind"] == "step"), default=0)
    if not again and not back and config.training.steps < done:
        raise ConfigError(
            f"training.steps {config.training.steps} lies behind step {done}, which is done", where=str(directory),
            fix="give at least as many; or `--back-to STEP`, or `--again` for a new run",
        )  # fmt: skip
    complete = not back and _steps_in_summary(directory) >= config.training.steps
    if again and (complete or changes(run_config(directory), config)):
        await _set_aside(config, directory, console)
    elif complete:
        raise ConfigError(
            "this run is complete", where=str(directory),
            fix="its summary.json says how it went; raise training.steps to prolong it, or start anew with --again",
        )  # fmt: skip
    else:
        changed = check_changes(directory, config)
        console.print(f"going on with the run in {directory}", markup=False)
        for each in changed:
            console.print(f"  changed from here on: {each}", markup=False)
        (directory / "summary.json").unlink(missing_ok=True)


def _refuse_unkept(directory: Path, step: int) -> None:
    kept = sorted({found.step for found in list_whole(directory / "checkpoints")})
    if step not in kept:
        steps = ", ".join(map(str, kept)) or "none"
        raise NotFound(f"no checkpoint of step {step}", where=str(directory), fix=f"kept are steps {steps}")


async def _set_aside(config: RunConfig, directory: Path, console: Console) -> None:
    console.print(f"the run that was in {directory} is now in {set_aside(directory)}", markup=False)
    if url := Environment().redis_url.get_secret_value():
        async with await RunStore.connect(url, config.run.name) as store:
            await store.erase()
