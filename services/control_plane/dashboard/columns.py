"""Figures over optimizer steps, in bounded memory: when there are too many points, each comes to stand for two."""

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

from services.control_plane.dashboard.figures import Figure, Figures

POINTS = 1024  # at most; between half as many and so many once a run is longer
NAMES = 256  # at most: names of tasks and reward components are the run's, and those of a run are few


@dataclass
class _Column:
    """Of every point the figure and how many steps it is of; None and 0 where there is none."""

    values: list[Figure] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, figure: Figure, *, largest: bool) -> None:
        """One more step's figure to the last point."""
        if figure is None:
            return
        before, count = self.values[-1], self.counts[-1]
        self.counts[-1] = count + 1
        if before is None:
            self.values[-1] = figure
        else:
            self.values[-1] = max(before, figure) if largest else before + (figure - before) / (count + 1)

    def merged(self, *, largest: bool) -> "_Column":
        """Each two neighbours as one."""
        column = _Column()
        for index in range(0, len(self.values), 2):
            column.values.append(None)
            column.counts.append(0)
            for value, count in zip(self.values[index : index + 2], self.counts[index : index + 2], strict=True):
                if value is None:
                    continue
                before, known = column.values[-1], column.counts[-1]
                column.counts[-1] = known + count
                if before is None:
                    column.values[-1] = value
                elif largest:
                    column.values[-1] = max(before, value)
                else:
                    column.values[-1] = _short(before + (value - before) * count / (known + count))
        return column


class Columns:
    """Points in the order of their steps, every figure a column; what stands for several steps is their mean.

    A step that lies at or before the last cuts the tail off: the learner was restored, or went back. A point of several
    steps that is cut in its middle keeps its mean.
    """

    def __init__(self, points: int = POINTS) -> None:
        self._most, self._width = points, 1  # steps per point
        self._first: list[int] = []  # step of each point
        self._last: list[int] = []
        self._steps_of_last = 0
        self._columns: dict[str, _Column] = {}
        self._largest: frozenset[str] = frozenset()
        self.generation = 0  # of the points: those of another one cannot be added to
        self.revision = 0  # rises with whatever is added

    def __len__(self) -> int:
        return len(self._last)

    @property
    def step(self) -> int:
        """The last; 0 before the first."""
        return self._last[-1] if self._last else 0

    def add(self, step: int, figures: Figures) -> None:
        self.revision += 1
        if self._last and step <= self._last[-1]:
            self._cut(step)
        if not self._last or self._steps_of_last >= self._width:
            self._open(step)
        self._last[-1] = step
        self._steps_of_last += 1
        for name, figure in figures.values.items():
            column = self._column(name)
            if column is not None:
                column.add(figure, largest=name in figures.largest)
        self._largest |= figures.largest

    def since(self, index: int) -> dict[str, Any]:
        """The points from that one on, the first of them perhaps one that has grown."""
        index = min(index, len(self))
        return {
            "generation": self.generation,
            "from": index,
            "x": self._last[index:],
            "columns": {name: _all_short(column.values[index:]) for name, column in self._columns.items()},
        }

    def _column(self, name: str) -> _Column | None:
        column = self._columns.get(name)
        if column is None and len(self._columns) < NAMES:
            column = self._columns[name] = _Column([None] * len(self), [0] * len(self))
        return column

    def _open(self, step: int) -> None:
        """A point for the step that comes."""
        if len(self) >= self._most:
            self._merge()
        self._first.append(step)
        self._last.append(step)
        self._steps_of_last = 0
        for column in self._columns.values():
            column.values.append(None)
            column.counts.append(0)

    def _merge(self) -> None:
        self._width *= 2
        self._first = self._first[::2]
        self._last = [self._last[min(index + 1, len(self) - 1)] for index in range(0, len(self), 2)]
        for name, column in self._columns.items():
            self._columns[name] = column.merged(largest=name in self._largest)
        self.generation += 1

    def _cut(self, step: int) -> None:
        kept = bisect_left(self._first, step)
        del self._first[kept:], self._last[kept:]
        for column in self._columns.values():
            del column.values[kept:], column.counts[kept:]
        if self._last:
            self._last[-1] = min(self._last[-1], step - 1)
            self._steps_of_last = self._width  # the next begins a point of its own
        self.generation += 1


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _all_short(values: list[Figure]) -> list[Figure]:
    return [None if each is None else _short(each) for each in values]
