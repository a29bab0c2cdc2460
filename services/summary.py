"""What a finished run amounts to: summary.json and the closing report, from the run's record."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from services.control_plane.record import read
from services.control_plane.unscored import said

Interval = tuple[float, float]
_OTHER, _BESIDE = "other", ("archive", "publish")  # as in sapo_learner.phases, which needs torch
_PHASES = {
    "read": "waiting for groups", "decode": "decoding", "collate": "packing", "checkpoint": "checkpoints",
    "snapshot": "snapshots",
}  # fmt: skip


@dataclass
class _Run:
    """A run's record, taken apart; of a step or evaluation that was done twice, the last line."""

    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    busy: list[Interval] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)
    ceiling: dict[str, Any] = field(default_factory=dict)
    unscored: dict[str, Any] | None = None
    seconds: float = 0.0  # without the time between sessions

    @classmethod
    def read(cls, path: Path) -> "_Run":
        run, previous = cls(), None
        for line in read(path):
            match line["kind"]:
                case "step":
                    run.steps[line["step"]] = line
                case "evaluation":
                    run.evaluations[line["step"]] = line
                case "busy":
                    run.busy += [(start, end) for start, end in line["intervals"]]
                case "probe":
                    run.probes.append(line)
                case "warm_start":
                    run.ceiling = line["ceiling"]
                case "unscored":
                    run.unscored = {key: line[key] for key in ("reasons", "last", "worker")}
            if previous is not None and line["kind"] != "session":
                run.seconds += line["time"] - previous
            previous = line["time"]
        return run


def summarise(directory: Path, *, seed: int, ledger_balanced: bool) -> dict[str, Any]:
    """The figures of the run in `directory`; what was not measured is None."""
    run = _Run.read(directory / "record.jsonl")
    steps = list(run.steps.values())
    first, last = run.evaluations.get(0, {}), run.evaluations.get(max(run.steps, default=0), {})
    tokens = sum(step["tokens"] for step in steps)
    aged = sum(step["policy_age_mean"] * step["tokens"] for step in steps)
    return {
        "base_pass_at_1": first.get("pass_at_1"),
        "final_pass_at_1": last.get("pass_at_1"),
        "ceiling_pass_at_1": run.ceiling.get("mean"),
        "base_standard_error": first.get("standard_error"),
        "final_standard_error": last.get("standard_error"),
        "ceiling_standard_error": run.ceiling.get("standard_error"),
        "evaluation_samples": last.get("samples"),
        "base_interval_95": first.get("interval_95"),
        "final_interval_95": last.get("interval_95"),
        "by_task": _by_task(first, last),
        "steps": max(run.steps, default=0),
        "wall_seconds": run.seconds,
        "tokens_trained": tokens,
        "policy_age_mean": aged / tokens if tokens else None,
        "policy_age_max": max((step["policy_age_max"] for step in steps), default=None),
        "stale": sum(step["outcomes"].get("stale", 0) for step in steps),
        "mixed_version_responses": sum(step["mixed_version_responses"] for step in steps),
        "learner_time": learner_time(steps),
        "sampling_overlap": overlap([(step["started"], step["ended"]) for step in steps], run.busy),
        "ledger_balanced": ledger_balanced,
        "engine_logprob_max_abs_diff": max((probe["max_abs_diff"] for probe in run.probes), default=None),
        "engine_logprob_probes": len(run.probes),
        "engine_logprob_mixed_version_responses": sum(probe["mixed_version_responses"] for probe in run.probes),
        "unscored": run.unscored,
        "seed": seed,
        "examples": _examples(first, last),
    }


def write_summary(directory: Path, summary: dict[str, Any]) -> Path:
    path = directory / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    return path


def overlap(spans: Sequence[Interval], busy: Iterable[Interval]) -> float | None:
    """Share of the time in `spans` during which something was busy; None without spans. Intervals may overlap."""
    total = sum(end - start for start, end in spans)
    if not total:
        return None
    merged = _merge(busy)
    shared = sum(max(0.0, min(end, b_end) - max(start, b_start)) for start, end in spans for b_start, b_end in merged)
    return shared / total


def learner_time(steps: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Share of each phase in the learner's wall time, the largest first; {} for the records of older runs."""
    spent: Counter[str] = Counter()
    for step in steps:
        if _OTHER in (seconds := step.get("seconds", {})):
            spent.update({phase: each for phase, each in seconds.items() if phase not in _BESIDE})
    total = sum(spent.values())
    return {phase: each / total for phase, each in spent.most_common()} if total else {}


def _merge(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _by_task(first: dict[str, Any], last: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """pass@1 of each task and suite, before and after; {} in the records of older runs."""
    before, after = first.get("by_task", {}), last.get("by_task", {})
    keys = ("pass_at_1", "standard_error", "interval_95")
    return {
        label: {f"{when}_{key}": found[label][key] for when, found in (("base", before), ("final", after))
                if label in found for key in keys}
        for label in {**before, **after}
    }  # fmt: skip


def _examples(first: dict[str, Any], last: dict[str, Any]) -> list[dict[str, str]]:
    """Held-out problems with both policies' answers, those that changed first."""
    if not first or not last:
        return []
    pairs = [
        {"prompt": prompt, "base": before, "trained": after}
        for (prompt, before), (_, after) in zip(first["examples"], last["examples"], strict=False)
    ]
    return sorted(pairs, key=lambda pair: pair["base"] == pair["trained"])[:3]


def print_report(console: Console, summary: dict[str, Any], path: Path) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    if summary["examples"]:
        console.print()
        console.print(_example_table(summary["examples"]))
        console.print("(of the first problems, those whose answer changed)", style="dim")
    figures = [f"base {_percent(summary, 'base')}", f"after RL [bold]{_percent(summary, 'final')}[/bold]"]
    if summary["ceiling_pass_at_1"] is not None:
        figures.append(f"ceiling {_percent(summary, 'ceiling')}")
    say(f"\nheld-out pass@1: {' -> '.join(figures)}")
    if len(summary.get("by_task", {})) > 1:
        for label, each in summary["by_task"].items():
            say(f"  {escape(label)}: {_percent(each, 'base')} -> {_percent(each, 'final')}")
    if summary["ceiling_pass_at_1"] is not None:
        say(
            "What was taught: the base policy can do the task, but has the habit of guessing without any step in "
            "between.\nRL brought the steps back. It did not teach the task: the ceiling is the accuracy before the "
            "bad habit."
        )
    if not summary["tokens_trained"]:
        say("[bold red]Nothing was learned: no group had a spread of rewards.[/bold red]")
    else:
        say(
            f"policy age mean {summary['policy_age_mean']:.2f}, max {summary['policy_age_max']} steps; "
            f"{summary['mixed_version_responses']} responses span several versions"
        )
    if unscored := summary.get("unscored"):
        say(f"[yellow]{escape(said(unscored))}[/yellow]")
    if shares := summary.get("learner_time"):
        named = [f"{100 * each:.0f} % {_PHASES.get(phase, phase)}" for phase, each in shares.items() if each >= 0.005]
        say(f"learner: {', '.join(named)}")
    balance = "balances" if summary["ledger_balanced"] else "DOES NOT BALANCE"
    say(f"{summary['steps']} steps in {summary['wall_seconds']:.0f} s; ledger {balance}; {escape(str(path))}")


def _example_table(examples: list[dict[str, str]]) -> Table:
    """Each cell on lines of its own, and as it was written: a problem may hold what would be markup here."""
    table = Table(box=None, padding=(0, 3, 0, 0))
    for name in ("held-out problem", "base answers", "after RL"):
        table.add_column(name, overflow="fold")
    for each in examples:
        table.add_row(*(Text(each[key]) for key in ("prompt", "base", "trained")))
    return table


def _percent(summary: dict[str, Any], which: str) -> str:
    mean, error = summary.get(f"{which}_pass_at_1"), summary.get(f"{which}_standard_error")
    return "not measured" if mean is None or error is None else f"{100 * mean:.1f} ± {100 * error:.1f} %"
