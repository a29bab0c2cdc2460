"""What `sapo check` prints: the figures as tables, then the verdict."""

from typing import Any

from rich.console import Console
from rich.table import Table

from services.judge import Judgement

SPREAD = ("tokens", "mean", "p50", "p99", "max")


def print_judgement(console: Console, found: Judgement, probes: dict[str, float]) -> None:
    """probes: worker -> largest difference on the engine's own probe, where it has one."""
    figures = found.figures
    engines = ", ".join(figures["engines"])
    _say(console, f"\n{engines}; {figures['dtype']}, temperature {figures['temperature']:g}\n")
    console.print(_spreads("recorded - recomputed log-prob, nats", {**figures["difference"], **figures["positions"]}))
    console.print()
    console.print(_versions(figures["sync"]))
    _say(console, "\n" + "\n".join(_lines(figures, probes)))
    colour = {"agrees": "green", "disagrees": "red", "untested": "yellow"}[found.verdict.state]
    console.print(f"\n{found.verdict.sentence}", style=f"bold {colour}", markup=False, soft_wrap=True)


def _lines(figures: dict[str, Any], probes: dict[str, float]) -> list[str]:
    ratio, gate, speed = figures["ratio"], figures["gate"], figures["speed"]
    lines = [f"importance ratio min {ratio['min']:.6f}, max {ratio['max']:.6f}, std {ratio['std']:.2g}"]
    if gate:
        lines.append(f"gate min {gate['min']:.6f}, mean {gate['mean']:.6f}")
    lines.append(f"mean |log ratio| between versions {figures['drift']:.2g}")
    if tails := figures["tails"]:
        last = max(tails, key=lambda tail: (tail["threshold"] == 0.9, tail["expected"]))
        below = f"{1 - last['threshold']:.0%}"
        lines.append(f"tokens from the least likely {below}: {last['found']}, expected {last['expected']:.0f}")
    lines += [f"{worker} probe: largest difference {value:.2g}" for worker, value in sorted(probes.items())]
    lines += [f"{worker} samples {value:.0f} tokens/s" for worker, value in speed["engine"].items()]
    if speed["learner"]:
        lines.append(f"learner trains on {speed['learner']:.0f} tokens/s (forward and backward)")
    return lines


def _spreads(title: str, rows: dict[str, dict[str, float]]) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0))
    table.add_column(title)
    for name in SPREAD:
        table.add_column(name, justify="right")
    for name, spread in rows.items():
        figures = (f"{spread[key]:.2g}" if key in spread else "-" for key in SPREAD[1:])
        table.add_row(name, str(spread["tokens"]), *figures)
    return table


def _versions(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0))
    for name in ("worker", "version", "step", "tokens", "digest, published and verified"):
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(row[key]) for key in ("worker", "version", "step", "tokens")), row["digest"][:12])
    return table


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
