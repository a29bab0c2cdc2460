"""The `sapo up` command: check, start, show, drain, report."""

import asyncio
import signal
from pathlib import Path

from rich.console import Console

from sapo_learner.errors import ConfigError
from services.local import LocalRun, set_aside
from services.run_directory import audit_run, run_config
from services.runstore import RunStore
from services.runtime.settings import Environment, RunConfig
from services.summary import print_report, summarise, write_summary
from services.view import View


async def up(config: RunConfig, console: Console, *, again: bool) -> int:
    """Run to the end or until Ctrl-C; returns the exit code. Raises SapoError for what cannot be run."""
    from sapo_learner.objectives import build

    build(config.objective.name, **config.objective.options)
    directory = config.run.directory
    await _make_way(config, directory, console, again=again)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
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


async def _make_way(config: RunConfig, directory: Path, console: Console, *, again: bool) -> None:
    """Go on with an unfinished run of the same configuration; anything else needs --again."""
    if not (directory / "run.yaml").exists():
        return
    complete = (directory / "summary.json").exists()
    changed = _changes(run_config(directory), config)
    if not complete and not changed:
        console.print(f"going on with the run in {directory}", highlight=False)
    elif again:
        console.print(f"the run that was in {directory} is now in {set_aside(directory)}", highlight=False)
        if url := Environment().redis_url.get_secret_value():
            async with await RunStore.connect(url, config.run.name) as store:
                await store.erase()
    elif complete:
        raise ConfigError(
            "this run is complete", where=str(directory),
            fix="its summary.json says how it went; start anew with --again, or another one with --set run.name=...",
        )  # fmt: skip
    else:
        raise ConfigError(
            f"the run there was started with other settings: {', '.join(changed)}", where=str(directory),
            fix="use the same settings to go on, or --again to set it aside and start anew",
        )  # fmt: skip


def _changes(before: RunConfig, now: RunConfig) -> list[str]:
    """Dotted names of the settings that differ, the run's directory aside."""
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key) and key != "run.dir")


def _flat(settings: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
