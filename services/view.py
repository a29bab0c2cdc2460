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
STALLED_SECONDS = 20.0
SHOWN_EVALUATIONS = 8


class View:
    """Use as a context manager; call it with the run whenever there may be news."""

    def __init__(self, console: Console) -> None:
        self._console = console
        animate = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, refresh_per_second=4, transient=False) if animate else None
        self._pace = Pace()
        self._said, self._said_at = "", 0.0
        self._noted = set[str]()
        self._addressed = False

    def __enter__(self) -> Callable[["LocalRun"], None]:
        if self._live:
            self._live.__enter__()
        return self.draw

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.__exit__(None, None, None)

    def draw(self, run: "LocalRun") -> None:
        self._pace.see(run.status)
        if run.status and not self._addressed:  # not before it answers
            self._addressed = True
            self._say(f"dashboard: {run.dashboard}")
        for note in notes(run.status):
            if note not in self._noted:  # in full and to stay, above what moves
                self._noted.add(note)
                self._say(f"note: {note}")
        if self._live:
            self._live.update(_panel(run, self._pace))
            return
        line = _line(run, self._pace)
        if line != self._said and time.monotonic() - self._said_at >= PLAIN_SECONDS:
            self._said, self._said_at = line, time.monotonic()
            self._say(line)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


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
        if time.monotonic() - self._last[0] > STALLED_SECONDS and self._last[1] < steps:
            return "stalled"
        rate = (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
        seconds = max(0.0, (steps - self._last[1]) / rate - (time.monotonic() - self._last[0]))
        return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


def _line(run: "LocalRun", pace: Pace) -> str:
    status = run.status
    if not status:
        return "starting: " + ", ".join(f"{each.name} {each.state}" for each in run.children.values())
    parts = [f"step {status['learner']['step']}/{status['steps']}", f"eta {pace.eta(status['steps'])}"]
    step, evaluations = status["last_step"], status["evaluations"]
    if step:
        parts += [f"reward {_figure(step, 'reward', 2)}", f"policy age {_figure(step, 'policy_age_mean', 1)}"]
    if evaluations:
        parts.append(f"held-out pass@1 {evaluations[-1]['pass_at_1']:.3f} (step {evaluations[-1]['step']})")
    if status["version"] is not None:
        parts += [f"version {status['version']}", f"{_tokens_per_second(status)} tokens/s"]
    parts += [f"{each.name} {each.state}" for each in run.children.values() if "died" in each.state]
    return " | ".join(part for part in [*parts, worry(status)] if part)


def _figure(step: dict[str, Any], name: str, digits: int) -> str:
    """A figure of a step, "-" where it has none: what describes trained tokens is 0 in a step without any."""
    value = step.get(name)
    return "-" if value is None or (not step["tokens"] and name != "reward") else f"{value:.{digits}f}"


def _panel(run: "LocalRun", pace: Pace) -> Group:
    """The same lines at all times, so that the frame never grows or shrinks."""
    status = run.status
    done, total = status.get("learner", {}).get("step", 0), status.get("steps", run.config.training.steps)
    head = Table.grid(padding=(0, 1))
    head.add_row(
        Text(run.config.run.name, "bold"), ProgressBar(total=total, completed=done, width=40), f"step {done}/{total}",
        f"ETA {pace.eta(total)}", Text(status.get("state", "starting"), "cyan"),
    )  # fmt: skip
    worries = [worry(status) if status else "", next(iter(notes(status)), "")]
    return Group(head, *_figures(status), _processes(run), *(Text(each, "yellow", no_wrap=True) for each in worries))


def _figures(status: dict[str, Any]) -> list[Text]:
    step, evaluations = status.get("last_step"), status.get("evaluations", [])
    learning = held_out = "-"
    if step:
        learning = (
            f"{_figure(step, 'reward', 3)}   entropy {_figure(step, 'entropy', 3)}   spread of log-ratio "
            f"{_figure(step, 'log_ratio_std', 3)}   policy age {_figure(step, 'policy_age_mean', 2)} "
            f"(max {_figure(step, 'policy_age_max', 0)})"
        )
    if evaluations:
        first, recent = evaluations[0], evaluations[1:][-SHOWN_EVALUATIONS:]
        trail = [f"{first['pass_at_1']:.2f}", *(["..."] if len(evaluations) > SHOWN_EVALUATIONS + 1 else [])]
        held_out = " ".join([*trail, *(f"{each['pass_at_1']:.2f}" for each in recent)])
        held_out += f"   (step {evaluations[-1]['step']})"
    flow = "-"
    if status and status["version"] is not None:
        flow = (
            f"version {status['version']}   {_tokens_per_second(status)} tokens/s   "
            f"groups ready {status['groups_ready']}   open leases {status['open_leases']}"
        )
    rows = (("reward", learning), ("held-out pass@1", held_out), ("sampling", flow))
    return [Text.assemble((f"{name:<16}", "dim"), value) for name, value in rows]


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
        elif child.name.startswith("rollout") and child.state == "running":
            detail = "waits for the first policy"
        style = {"running": "green", "done": "green"}.get(child.state, "red" if "died" in child.state else "")
        row = (child.name, str(child.pid or "-"), Text(child.state, style), str(child.restarts or ""), Text(detail))
        table.add_row(*row)
    return table


def notes(status: dict[str, Any]) -> list[str]:
    """What the workers want a person to know, each once."""
    return list(dict.fromkeys(note for each in status.get("workers", []) for note in each.get("notes", [])))


def worry(status: dict[str, Any]) -> str:
    """What there is to wait for, or to worry about."""
    learner, step = status["learner"], status["last_step"]
    if status["state"] == "evaluating":
        return f"waiting for the evaluation of {', '.join(each['id'] for each in status['evaluating'])}"
    if learner["waiting_for"]:
        return f"learner waits for {learner['waiting_for']}"
    if step and not step["tokens"]:
        return "the last step had no signal: all responses of each group had the same reward"
    return ""


def _tokens_per_second(status: dict[str, Any]) -> str:
    """Of all workers that are heard of; "-" without any."""
    workers = status.get("workers", [])
    return f"{sum(each['tokens_per_second'] for each in workers):,.0f}" if workers else "-"
