"""The run's record as the page draws it: kept up line by line, bounded in memory, never made anew for a tab."""

from collections.abc import Mapping
from typing import Any

from services.control_plane.dashboard import figures
from services.control_plane.dashboard.columns import POINTS, Columns
from services.control_plane.dashboard.figures import Figures

Line = Mapping[str, Any]


class History:
    """Give `hear` every line of the record, in order."""

    def __init__(self) -> None:
        self.steps = Columns()
        self.evaluations: dict[int, Figures] = {}  # by step, in their order
        self.evaluated = 0  # rises with every evaluation
        self.histograms: dict[str, Any] | None = None
        """The newest step's that has some: see `sapo_learner.diagnostics.histograms`."""
        self.saved_step = 0
        """Of the newest checkpoint that a step's line tells of."""
        self._heard: dict[str, float] = {}  # worker -> time of its last line of busy intervals
        self._idle: list[float] = []  # shares of time in which an engine stood still, since the last step

    def hear(self, line: Line) -> None:
        """A line that is not as it should be is left out."""
        step = line.get("step")
        match line.get("kind"):
            case "busy":
                self._engine(line)
            case "step" if isinstance(step, int):
                self._step(step, line)
            case "evaluation" if isinstance(step, int):
                self._evaluation(step, figures.of_evaluation(line))

    def _step(self, step: int, line: Line) -> None:
        found = figures.of_step(line)
        found.values["idle"] = sum(self._idle) / len(self._idle) if self._idle else None
        self._idle.clear()
        self.steps.add(step, found)
        if "checkpoint" in (line.get("seconds") or {}):
            self.saved_step = step
        if isinstance(histograms := line.get("histograms"), dict):
            self.histograms = {"step": step, **histograms}

    def _evaluation(self, step: int, found: Figures) -> None:
        self.evaluations = dict(sorted((self.evaluations | {step: found}).items()))
        if len(self.evaluations) > POINTS:
            self.evaluations = dict([*self.evaluations.items()][::2])
        self.evaluated += 1

    def _engine(self, line: Line) -> None:
        """Share of the time since the worker's last such line in which its engine did not sample."""
        worker, now, intervals = str(line.get("worker")), figures.number(line.get("time")), line.get("intervals")
        if now is None or not isinstance(intervals, list):
            return
        before = self._heard.pop(worker, None)
        self._heard[worker] = now
        if len(self._heard) > POINTS:
            self._heard.pop(next(iter(self._heard)))
        if before is None or now <= before or len(self._idle) >= POINTS:
            return
        try:
            busy = sum(max(0.0, min(end, now) - max(start, before)) for start, end in intervals)
        except (TypeError, ValueError):
            return
        self._idle.append(min(1.0, max(0.0, 1.0 - busy / (now - before))))

    def evaluation_columns(self) -> dict[str, Any]:
        names = dict.fromkeys(name for each in self.evaluations.values() for name in each.values)
        return {
            "x": [*self.evaluations],
            "columns": {name: [each.values.get(name) for each in self.evaluations.values()] for name in names},
        }

    def everything(self) -> dict[str, Any]:
        return {
            "steps": self.steps.since(0), "evaluations": self.evaluation_columns(), "histograms": self.histograms,
        }  # fmt: skip
