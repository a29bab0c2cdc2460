"""The `sapo up` command: check, start, show, drain, report."""

import asyncio
import json
import os
import signal
from pathlib import Path

from rich.console import Console

from sapo_learner.errors import ConfigError, Unavailable
from services.control_plane.record import read
from services.local import LocalRun, set_aside
from services.preflight import check
from services.run_directory import audit_run, live_services, load_any_policy, run_config
from services.runstore import RunStore
from services.runtime.changes import changes, check_changes
from services.runtime.settings import Environment, RunConfig
from services.summary import print_report, summarise, write_summary
from services.view import View


async def up(config: RunConfig, console: Console, *, again: bool, start_from: str | None = None) -> int:
    """Run to the end or until Ctrl-C; returns the exit code. Raises SapoError for what cannot be run.

    start_from: POLICY that a new run begins with, instead of policy.source.
    """
    if start_from:
        config = await _begin_with(start_from, config)
    check(config)
    directory = config.run.directory
    await _make_way(config, directory, console, again=again)
    stop = _asked_to_stop(console)
    run = LocalRun(config, workers=config.local.rollout_workers)
    console.print(f"run [bold]{config.run.name}[/bold] in {directory}; logs in {directory}/logs", highlight=False)
    try:
        await run.start()
        with View(console) as draw:
            finished = await run.finished(stop, draw)
    finally:
        console.print("draining ...", style="dim")
        await run.stop()
    if not finished:
        console.print("stopped; the same command goes on from here", highlight=False)
        return 0
    report = await audit_run(directory)
    summary = summarise(directory, seed=config.run.seed, ledger_balanced=report.balanced)
    print_report(console, summary, write_summary(directory, summary))
    return 0 if report.balanced else 1


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


async def _begin_with(name: str, config: RunConfig) -> RunConfig:
    """Keep a copy of the policy beside the run's directory (named by its weights) and let it be the run's source."""
    from sapo_learner.policy import write_policy
    from sapo_learner.snapshot import weights_digest

    policy, _ = await load_any_policy(name)
    directory = config.run.directory.resolve()
    source = directory.with_name(f"{directory.name}-from-{weights_digest(policy.tensors())[:12]}")
    if not source.exists():
        write_policy(policy, source)
    return config.model_copy(update={"policy": config.policy.model_copy(update={"source": str(source)})})


async def _make_way(config: RunConfig, directory: Path, console: Console, *, again: bool) -> None:
    """Go on with an unfinished run, listing what has changed; a complete or another run needs --again."""
    if live_services(directory):
        raise Unavailable("another `sapo up` runs on this directory", where=str(directory), fix="stop it first")
    if not (directory / "run.yaml").exists():
        return
    if not any(line["kind"] == "step" for line in read(directory / "record.jsonl")):
        if changes(run_config(directory), config):
            await _set_aside(config, directory, console)  # it had not begun
        return
    summary = directory / "summary.json"
    complete = summary.exists() and json.loads(summary.read_text())["steps"] >= config.training.steps
    if again and (complete or changes(run_config(directory), config)):
        await _set_aside(config, directory, console)
    elif complete:
        raise ConfigError(
            "this run is complete", where=str(directory),
            fix="its summary.json says how it went; raise training.steps to prolong it, or start anew with --again",
        )  # fmt: skip
    else:
        changed = check_changes(directory, config)
        console.print(f"going on with the run in {directory}", highlight=False)
        for each in changed:
            console.print(f"  changed from here on: {each}", highlight=False)
        summary.unlink(missing_ok=True)


async def _set_aside(config: RunConfig, directory: Path, console: Console) -> None:
    console.print(f"the run that was in {directory} is now in {set_aside(directory)}", highlight=False)
    if url := Environment().redis_url.get_secret_value():
        async with await RunStore.connect(url, config.run.name) as store:
            await store.erase()
