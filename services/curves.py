"""What of a run's record makes a curve: panels of series over its optimizer steps. Nothing is drawn here."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sapo_learner.errors import NotFound, Unavailable
from services.control_plane.record import read

Values = NDArray[np.float64]
Line = dict[str, Any]
Question = Literal["learning", "health", "speed", "objective"]


@dataclass(frozen=True)
class Series:
    """One curve. x, y: [n], y NaN where there is no figure. low, high: [n] of the band around it, if it has one.

    points: few, so that each is marked, and none is averaged with others. largest: what stands for several steps is
    the largest figure among them, not the mean.
    """

    label: str
    x: Values
    y: Values
    low: Values | None = None
    high: Values | None = None
    points: bool = False
    largest: bool = False


@dataclass(frozen=True)
class Recorded:
    """A run's record as far as curves need it: of a step or evaluation that was done twice, the last line.

    busy: worker -> [n, 2] when its engine was sampling, Unix seconds, disjoint and in order.
    """

    name: str
    steps: Sequence[Line]
    evaluations: Sequence[Line]
    busy: Mapping[str, Values]

    @classmethod
    def read(cls, directory: Path, name: str) -> "Recorded":
        """Raises NotFound where there is no record, Unavailable where it has no step yet."""
        path = directory / "record.jsonl"
        if not path.is_file():
            raise NotFound("no record.jsonl there", where=str(directory), fix="give a run's directory, as runs/demo")
        steps, evaluations = dict[int, Line](), dict[int, Line]()
        busy = defaultdict[str, list[tuple[float, float]]](list)
        for line in read(path):
            match line["kind"]:
                case "step":
                    while steps and next(reversed(steps)) >= line["step"]:  # the learner was restored, or went back
                        steps.popitem()
                    steps[line["step"]] = line
                case "evaluation":
                    evaluations[line["step"]] = line
                case "busy":
                    busy[line["worker"]] += [(start, end) for start, end in line["intervals"]]
        if not steps:
            fix = "plot it when the first step is done; `sapo status` says what it waits for"
            raise Unavailable("the run has done no step yet", where=str(directory), fix=fix)
        known = [evaluations[step] for step in sorted(evaluations) if step <= max(steps)]
        return cls(name, [*steps.values()], known, {worker: _disjoint(each) for worker, each in busy.items()})

    @property
    def numbers(self) -> Values:
        """[n] of the steps."""
        return self.values(lambda line: line["step"])

    def values(self, of: Callable[[Line], Any], *, trained: bool = False) -> Values:
        """[n] a figure of every step, NaN where it is None. trained: also of steps without a token to learn from."""
        found = [None if trained and not line["tokens"] else of(line) for line in self.steps]
        return np.array([np.nan if each is None else each for each in found], np.float64)


def _disjoint(intervals: Sequence[tuple[float, float]]) -> Values:
    merged: list[list[float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    return np.array(merged, np.float64).reshape(-1, 2)


@dataclass(frozen=True)
class Panel:
    """One question's part: y over x. share: y lies between 0 and 1."""

    question: Question
    name: str
    title: str
    unit: str
    series: Callable[[Recorded], list[Series]]
    x: str = "optimizer step"
    share: bool = False


def _figure(name: str, label: str = "", *, trained: bool = False) -> Callable[[Recorded], list[Series]]:
    return lambda run: [Series(label, run.numbers, run.values(lambda line: line.get(name), trained=trained))]


def _pass_at_1(run: Recorded) -> list[Series]:
    lines = run.evaluations
    if not lines:
        return []
    mean = [line["pass_at_1"] for line in lines]
    error = [1.96 * line["standard_error"] for line in lines]
    around = zip(lines, mean, error, strict=True)  # older records have no interval
    interval = np.array([line.get("interval_95") or (value - wide, value + wide) for line, value, wide in around])
    x = np.array([line["step"] for line in lines], np.float64)
    return [Series("", x, np.array(mean), interval[:, 0], interval[:, 1], points=True)]


def _policy_age(run: Recorded) -> list[Series]:
    mean = run.values(lambda line: line["policy_age_mean"], trained=True)
    oldest = run.values(lambda line: line["policy_age_max"], trained=True)
    return [Series("mean", run.numbers, mean), Series("oldest token", run.numbers, oldest, largest=True)]


def _log_ratio(run: Recorded) -> list[Series]:
    """By age, youngest first; in all where the record has no ages."""
    spreads = [line.get("diagnostics", {}).get("log_ratio_std", {}) for line in run.steps]
    ages = sorted({group for each in spreads for group in each if group.startswith("age_")}, key=_youngest)
    if not ages:
        return _figure("log_ratio_std", "all ages", trained=True)(run)
    return [Series(age_label(age), run.numbers, _diagnostic(run, "log_ratio_std", age)) for age in ages]


def _youngest(group: str) -> int:
    return int(group.split("_")[1])


def age_label(group: str) -> str:
    """As it is said: age_3_4 -> "age 3 to 4"."""
    first, _, last = group.removeprefix("age_").partition("_")
    return f"age {first}" + (" and older" if last == "on" else f" to {last}" if last else "")


def _outcomes(run: Recorded) -> list[Series]:
    names = dict.fromkeys(name for line in run.steps for name, count in line["outcomes"].items() if count)
    return [Series(name, run.numbers, run.values(partial(_outcome, name))) for name in names]


def _outcome(name: str, line: Line) -> int:
    return int(line["outcomes"].get(name, 0))


def _diagnostic(run: Recorded, name: str, group: str) -> Values:
    return run.values(lambda line: line.get("diagnostics", {}).get(name, {}).get(group))


def _weight(sign: str) -> Callable[[Recorded], list[Series]]:
    """The gate's mean with the middle 80 % of the tokens; of an objective without one, the coefficient's."""

    def series(run: Recorded) -> list[Series]:
        gated = any("gate" in line.get("diagnostics", {}) for line in run.steps)
        name = "gate" if gated else "coefficient"
        mean, low, high = (_diagnostic(run, f"{name}{end}", sign) for end in ("", "_p10", "_p90"))
        return [Series("gate" if gated else "coefficient (no gate)", run.numbers, mean, low, high)]

    return series


def _effective_sample_size(sign: str) -> Callable[[Recorded], list[Series]]:
    return lambda run: [Series("", run.numbers, _diagnostic(run, "effective_sample_size", sign))]


def _duration(run: Recorded) -> Values:
    """[n] seconds of every step, waiting included."""
    return run.values(lambda line: line["waited_seconds"] + line["ended"] - line["started"])


def _step_time(run: Recorded) -> list[Series]:
    """From the second step on: the first waits for everything to start, and beside it all others would look alike."""
    trained = run.values(lambda line: sum(line["seconds"].values()))
    waited = run.values(lambda line: line["waited_seconds"])
    parts = {"whole step": _duration(run), "update": trained, "waiting for groups": waited}
    later = slice(1, None) if len(run.steps) > 1 else slice(None)
    return [Series(label, run.numbers[later], each[later]) for label, each in parts.items()]


def _waiting(run: Recorded) -> list[Series]:
    duration = np.maximum(_duration(run), 1e-9)
    waited = run.values(lambda line: line["waited_seconds"]) / duration
    found = [Series("learner waits for groups", run.numbers, waited)]
    if len(idle := _idle(run)):
        found.append(Series("engines stand still", run.numbers, idle))
    return found


def _idle(run: Recorded) -> Values:
    """[n] share of each step's time in which a worker's engine did not sample, over those that were there; [0] without
    any worker."""
    end = run.values(lambda line: line["ended"])
    start = end - _duration(run)
    shares = []
    for intervals in (each for each in run.busy.values() if len(each)):
        lengths = np.diff(intervals, axis=1)[:, 0]
        done = np.stack([np.cumsum(lengths) - lengths, np.cumsum(lengths)], axis=1)
        sampled = np.interp(end, intervals.ravel(), done.ravel()) - np.interp(start, intervals.ravel(), done.ravel())
        there = (end > intervals[0, 0]) & (start < intervals[-1, 1])
        shares.append(np.where(there, 1 - sampled / np.maximum(end - start, 1e-9), np.nan))
    if not shares:
        return np.zeros(0)
    known = np.isfinite(shares)
    idle: Values = np.full(len(end), np.nan)
    np.divide(np.where(known, shares, 0.0).sum(axis=0), known.sum(axis=0), out=idle, where=known.any(axis=0))
    return idle


def _tokens_per_second(run: Recorded) -> list[Series]:
    return [Series("", run.numbers, run.values(lambda line: line["tokens"]) / np.maximum(_duration(run), 1e-9))]


def _progress(run: Recorded) -> list[Series]:
    return [Series("", np.cumsum(_duration(run)) / 60, run.numbers)]


PANELS: tuple[Panel, ...] = (
    Panel("learning", "reward", "Reward while training", "mean per response", _figure("reward")),
    Panel("learning", "pass_at_1", "Held-out pass@1", "share correct, 95 % interval", _pass_at_1, share=True),
    Panel("learning", "length", "Response length", "tokens, mean", _figure("response_tokens")),
    Panel("learning", "finished", "Responses that end by themselves", "share", _figure("stopped"), share=True),
    Panel("health", "entropy", "Entropy of the policy", "nats per token", _figure("entropy", trained=True)),
    Panel("health", "policy_age", "Policy age of trained tokens", "optimizer steps", _policy_age),
    Panel("health", "log_ratio", "Spread of the log-ratio, by policy age", "standard deviation, nats", _log_ratio),
    Panel("health", "outcomes", "What became of the groups", "groups per step", _outcomes),
    Panel("speed", "step_time", "Time of a step", "seconds", _step_time),
    Panel("speed", "waiting", "Who waits", "share of the step's time", _waiting, share=True),
    Panel("speed", "tokens", "Tokens trained", "tokens per second", _tokens_per_second),
    Panel("speed", "progress", "Progress", "optimizer step", _progress, x="minutes, pauses left out"),
    Panel("objective", "weight_positive", "Weight of tokens, advantage > 0", "mean, 10 to 90 %", _weight("positive")),
    Panel("objective", "weight_negative", "Weight of tokens, advantage < 0", "mean, 10 to 90 %", _weight("negative")),
    Panel("objective", "sample_size_positive", "Effective sample size, advantage > 0", "share of tokens",
          _effective_sample_size("positive"), share=True),
    Panel("objective", "sample_size_negative", "Effective sample size, advantage < 0", "share of tokens",
          _effective_sample_size("negative"), share=True),
)  # fmt: skip
