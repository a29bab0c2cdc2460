"""`sapo status` for a person, of a run that goes on or has stopped: what runs, how far it is, who waits for whom."""

import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from services.control_plane.unscored import said
from services.printable import printable
from services.view import notes, worry


def print_status(console: Console, status: dict[str, Any]) -> None:
    for line in lines(printable(status)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def lines(status: dict[str, Any]) -> Iterator[str]:
    running = "learner" in status
    step = status["learner"]["step"] if running else status["step"]
    yield f"run {status['run']}: {status['state']}, step {step}/{status['steps']}"
    if running:
        yield from _flow(status)
    for each in status["evaluations"][-3:]:
        yield f"held-out pass@1 at step {each['step']}: {each['pass_at_1']:.3f} ± {each['standard_error']:.3f}"
        if len(tasks := each.get("by_task", {})) > 1:
            yield "  " + ", ".join(f"{label} {one['pass_at_1']:.3f}" for label, one in tasks.items())
    for each in status.get("processes", []):
        yield _process(each)
    for each in status["workers"]:
        yield _worker(each)
    if unscored := status.get("unscored"):
        yield f"note: {said(unscored)}"
    yield from (f"note: {note}" for note in notes(status))
    if dashboard := status.get("dashboard"):
        yield f"dashboard: {dashboard}"


def _flow(status: dict[str, Any]) -> Iterator[str]:
    version = "no policy published yet" if status["version"] is None else f"version {status['version']}"
    yield (
        f"{version}, {status['accepted']} groups accepted, {status['groups_ready']} ready, "
        f"{status['open_leases']} open leases; control plane up since {_clock(status['since'])}"
    )
    for each in status.get("slowest_draws", []):
        text = f"draw {each['draw']} (attempt {each['attempt']}) has been with {each['worker']}"
        yield f"{text} for {each['age_seconds']:.1f} s"
    if waiting := worry(status):
        yield waiting
    if not status["workers"] and status["state"] != "finished":
        yield "no rollout worker is heard of: everybody waits for one"


def _process(process: dict[str, Any]) -> str:
    if process["since"] is None:
        return f"{process['name']}: does not run"
    waits = f", waits for {', '.join(process['waiting_for'])}" if process["waiting_for"] else ""
    return f"{process['name']}: process {process['pid']} since {_clock(process['since'])}{waits}"


def _worker(worker: dict[str, Any]) -> str:
    waits = f", waits for {worker['waiting_for']}" if worker["waiting_for"] else ""
    probe = worker.get("probe")
    agrees = f", within {probe['max']:.1e} nats of the learner (mean {probe['mean']:.1e})" if probe else ""
    return (
        f"{worker['worker']}: version {worker['version']}, {worker['rows']} rows, "
        f"{worker['tokens_per_second']:,.0f} tokens/s, heard of {worker['age_seconds']:.1f} s ago{agrees}{waits}"
    )


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
