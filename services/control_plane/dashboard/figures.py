"""What of a line of the run's record is a figure to draw: by name, a number or None. No line breaks this."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

Figure = float | None
Line = Mapping[str, Any]
COMPONENTS = 24  # of rewards, of outcomes, of tasks: more are not drawn

_PLAIN = ("reward", "response_tokens", "stopped")
_OF_TOKENS = ("entropy", "policy_age_mean", "policy_age_max", "log_ratio_std", "loss", "clamped_fraction")
_BY_SIGN = (
    "gate", "gate_p10", "gate_p90", "coefficient", "coefficient_p10", "coefficient_p90", "effective_sample_size",
    "log_ratio", "kl",
)  # fmt: skip
BESIDE = ("phase/archive", "phase/publish")  # while others go on: see docs/scaling.md
_SIGNS = ("all", "positive", "negative")


class Figures(NamedTuple):
    """largest: names of those that stand for several steps by the largest among them, not by the mean."""

    values: dict[str, Figure]
    largest: frozenset[str] = frozenset()


_LARGEST = frozenset({"policy_age_max"})


def number(value: Any) -> Figure:
    """None for everything that cannot be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def of_step(line: Line) -> Figures:
    """What describes trained tokens is None in a step that had none."""
    found = {name: number(line.get(name)) for name in (*_PLAIN, "learning_rate", "gradient_norm", "mfu")}
    for name in _OF_TOKENS:
        found[name] = number(line.get(name)) if line.get("tokens") else None
    found |= _several("reward/", line.get("rewards")) | _several("outcome/", line.get("outcomes"))
    return Figures(found | _times(line) | _diagnostics(line), _LARGEST)


def _times(line: Line) -> dict[str, Figure]:
    """Seconds from the step before to this one, waiting, checkpoint and snapshot included, and where they went."""
    phases = _several("phase/", line.get("seconds"))
    waited = number(line.get("waited_seconds"))
    one_after_another = [seconds or 0.0 for name, seconds in phases.items() if name not in BESIDE]
    if waited is None or not one_after_another:
        return phases
    whole = max(sum(one_after_another), waited, 1e-9)
    tokens = number(line.get("tokens")) or 0.0
    return phases | {
        "seconds": whole, "waited": waited, "waiting": waited / whole, "tokens_per_second": tokens / whole,
    }  # fmt: skip


def _diagnostics(line: Line) -> dict[str, Figure]:
    """name/sign of the advantage, and the spread of the log-ratio by age."""
    diagnostics = _mapping(line.get("diagnostics"))
    found: dict[str, Figure] = {}
    for name in _BY_SIGN:
        groups = _mapping(diagnostics.get(name))
        found |= {f"{name}/{sign}": number(groups[sign]) for sign in _SIGNS if sign in groups}
    spreads = _mapping(diagnostics.get("log_ratio_std"))
    ages = [group for group in spreads if str(group).startswith("age_")]
    return found | {f"log_ratio_std/{group}": number(spreads[group]) for group in ages[:COMPONENTS]}


def of_evaluation(line: Line) -> Figures:
    """With the 95 % interval; of the tasks and suites each its pass@1, where there are several."""
    rate, error = number(line.get("pass_at_1")), number(line.get("standard_error")) or 0.0
    low, high = (None, None) if rate is None else (rate - 1.96 * error, rate + 1.96 * error)
    interval = line.get("interval_95")
    if isinstance(interval, list | tuple) and len(interval) == 2:
        low, high = number(interval[0]), number(interval[1])
    found = {"pass_at_1": rate, "low": low, "high": high}
    by_task = _mapping(line.get("by_task"))
    if len(by_task) > 1:
        for label in [*by_task][:COMPONENTS]:
            found[f"task/{label}"] = number(_mapping(by_task[label]).get("pass_at_1"))
    return Figures(found)


def _several(prefix: str, mapping: Any) -> dict[str, Figure]:
    return {f"{prefix}{name}": number(value) for name, value in [*_mapping(mapping).items()][:COMPONENTS]}


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}
