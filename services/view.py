"""What `sapo up` shows: a live view on a terminal, plain lines anywhere else."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from services.local import LocalRun

PLAIN_SECONDS = 5.0


class View:
    """Use as a context manager; call it with the run whenever there may be news."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
        self._pace = Pace()
        self._said, self._said_at = "", 0.0

    def __enter__(self) -> Callable[["LocalRun"], None]:
        if self._live:
            self._live.__enter__()
        return self.draw

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.__exit__(None, None, None)

    def draw(self, run: "LocalRun") -> None:
        self._pace.see(run.status)
        if self._live:
            self._live.update(_panel(run, self._pace))
            return
        line = _line(run, self._pace)
        if line != self._said and time.monotonic() - self._said_at >= PLAIN_SECONDS:
            self._said, self._said_at = line, time.monotonic()
            self._console.print(line, highlight=False, soft_wrap=True)


class Pace:
    """Steps per second, from when steps were seen, for the ETA."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None
        self._last: tuple[float, int] | None = None

    def see(self, status: dict[str, Any]) -> None:
        step = status.get("learner", {}).get("step", 0)
        if step and (self._last is None or step != self._last[1]):
            self._last = (time.monotonic(), step)
            self._first = self._first or self._last

    def eta(self, steps: int) -> str:
        if not self._first or not self._last or self._last[1] <= self._first[1]:
            return "-"
        rate = (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
        seconds = max(0.0, (steps - self._last[1]) / rate - (time.monotonic() - self._last[0]))
        return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


def _line(run: "LocalRun", pace: Pace) -> str:
    status = run.status
    learner, step = status.get("learner", {}), status.get("last_step")
    if not status:
        return "starting: " + ", ".join(f"{each.name} {each.state}" for each in run.children.values())
    parts = [f"step {learner['step']}/{status['steps']}", f"eta {pace.eta(status['steps'])}"]
    if step:
        parts += [f"reward {step['reward']:.2f}", f"policy age {step['policy_age_mean']:.1f}"]
    if status["evaluations"]:
        last = status["evaluations"][-1]
        parts.append(f"held-out pass@1 {last['pass_at_1']:.3f} (step {last['step']})")
    parts += [f"version {status['version']}", f"{_tokens_per_second(status):,.0f} tokens/s", _waiting(status)]
    return " | ".join(part for part in parts if part)


def _panel(run: "LocalRun", pace: Pace) -> Group:
    status = run.status
    learner = status.get("learner", {})
    done, total = learner.get("step", 0), status.get("steps", run.config.training.steps)
    head = Table.grid(padding=(0, 1))
    head.add_row(
        Text(run.config.run.name, "bold"), ProgressBar(total=total, completed=done, width=40), f"step {done}/{total}",
        f"ETA {pace.eta(total)}", Text(status.get("state", "starting"), "cyan"),
    )  # fmt: skip
    figures = Table.grid(padding=(0, 3))
    step, evaluations = status.get("last_step"), status.get("evaluations", [])
    if step:
        figures.add_row(
            f"reward [bold]{step['reward']:.3f}[/bold]",
            f"entropy {step['entropy']:.3f}",
            f"policy age {step['policy_age_mean']:.2f} (max {step['policy_age_max']})",
            f"spread of log-ratio {step['log_ratio_std']:.3f}",
        )
    if evaluations:
        trail = " ".join(f"{each['pass_at_1']:.2f}" for each in evaluations[-8:])
        figures.add_row(f"held-out pass@1 [bold]{evaluations[-1]['pass_at_1']:.3f}[/bold]", trail)
    if status:
        figures.add_row(
            f"version {status['version']}",
            f"{_tokens_per_second(status):,.0f} tokens/s",
            f"groups ready {status['groups_ready']}",
            f"open leases {status['open_leases']}",
        )
    return Group(head, figures, _processes(run), Text(_waiting(status), "yellow"))


def _processes(run: "LocalRun") -> Table:
    workers = {each["worker"]: each for each in run.status.get("workers", [])}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("process", "pid", "state", "restarts", ""):
        table.add_column(column)
    for child in run.children.values():
        detail = ""
        if child.name in workers:
            worker = workers[child.name]
            detail = f"version {worker['version']}, {worker['rows']} rows"
            detail += f", waits for {worker['waiting_for']}" if worker["waiting_for"] else ""
        style = {"running": "green", "done": "green"}.get(child.state, "red" if "died" in child.state else "")
        table.add_row(child.name, str(child.pid or "-"), Text(child.state, style), str(child.restarts or ""), detail)
    return table


def _waiting(status: dict[str, Any]) -> str:
    if not status:
        return ""
    learner = status["learner"]
    return f"learner: {learner['waiting_for']}" if learner["waiting_for"] else ""


def _tokens_per_second(status: dict[str, Any]) -> float:
    return float(sum(each["tokens_per_second"] for each in status.get("workers", [])))


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def print_status(console: Console, status: dict[str, Any]) -> None:
    """`sapo status` for a person."""
    learner = status["learner"]
    console.print(
        f"run {status['run']}: {status['state']}, step {learner['step']}/{status['steps']}, "
        f"version {status['version']}, {status['accepted']} groups accepted, {status['groups_ready']} ready, "
        f"{status['open_leases']} open leases",
        highlight=False,
    )
    console.print(f"control plane up since {_clock(status['since'])}", highlight=False)
    for each in status["slowest_draws"]:
        text = f"draw {each['draw']} (attempt {each['attempt']}) has been with {each['worker']}"
        console.print(f"{text} for {each['age_seconds']:.1f} s", highlight=False)
    if learner["waiting_for"]:
        console.print(f"learner waits for {learner['waiting_for']}", highlight=False)
    for each in status["evaluations"][-3:]:
        text = f"held-out pass@1 at step {each['step']}: {each['pass_at_1']:.3f} ± {each['standard_error']:.3f}"
        console.print(text, highlight=False)
    for each in status["workers"]:
        waits = f", waits for {each['waiting_for']}" if each["waiting_for"] else ""
        console.print(
            f"{each['worker']}: version {each['version']}, {each['rows']} rows, "
            f"{each['tokens_per_second']:,.0f} tokens/s, heard of {each['age_seconds']:.1f} s ago{waits}",
            highlight=False,
        )
