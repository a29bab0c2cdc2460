"""The curves of one or several runs as PNGs, one figure per question. Needs matplotlib, the optional extra `plot`.

Colours are those of Okabe and Ito, which the colour-blind tell apart; runs differ in their markers, too, and lines of
one run in their dashes, so that a black and white print can be read. The same records give the same bytes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sapo_learner.errors import ConfigError
from services.curves import PANELS, Panel, Recorded, Series, Values
from services.task_parts.extras import load

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ((0, ()), (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 3)), (0, (1, 3)), (0, (9, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # of runs, where there are several
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.labelsize": 9, "legend.fontsize": 8,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.4, "figure.facecolor": "white",
}  # fmt: skip
DOTS_PER_INCH = 150
POINTS = 50  # of a curve; where a run has more steps, each stands for several
MARKED = 7  # of them, where a marker says whose curve it is
LEGEND_LETTERS = 100  # beside one another


def plot(runs: Sequence[Recorded], directory: Path, names: Sequence[str] = ()) -> list[Path]:
    """Write the figures that have anything to show; returns their paths. names: of the panels wanted; all when empty.

    Raises ConfigError for an unknown panel, for more runs than there are colours, and without matplotlib.
    """
    matplotlib = load("matplotlib", where="sapo plot", extra="plot")
    if len(runs) > len(COLOURS):
        raise ConfigError(f"{len(runs)} runs in one figure", where="sapo plot", fix=f"give at most {len(COLOURS)}")
    panels = _wanted(names)
    drawn = []
    with matplotlib.rc_context({"svg.hashsalt": "", **STYLE}):
        for question in dict.fromkeys(panel.question for panel in panels):
            shown = [panel for panel in panels if panel.question == question and _has_data(panel, runs)]
            if shown:
                directory.mkdir(parents=True, exist_ok=True)
                drawn.append(directory / f"{question}.png")
                _save(_figure(shown, runs), drawn[-1])
    return drawn


def _wanted(names: Sequence[str]) -> list[Panel]:
    known = {panel.name: panel for panel in PANELS}
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown metric {name!r}", where="--metrics", fix=f"there are {', '.join(known)}")
    return [panel for panel in PANELS if not names or panel.name in names]


def _has_data(panel: Panel, runs: Sequence[Recorded]) -> bool:
    return any(np.isfinite(series.y).any() for run in runs for series in panel.series(run))


def _figure(panels: Sequence[Panel], runs: Sequence[Recorded]) -> Any:
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.1 * rows + 0.5), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        _draw(figure.add_subplot(rows, columns, place), panel, runs)
    _head(figure, panels, runs)
    return figure


def _head(figure: Any, panels: Sequence[Panel], runs: Sequence[Recorded]) -> None:
    """Which runs, and what a point is."""
    from matplotlib.lines import Line2D

    if len(runs) > 1:
        looks = zip(runs, COLOURS, MARKERS, strict=False)
        handles = [Line2D([], [], color=colour, marker=marker, linewidth=2) for _, colour, marker in looks]
        names = [run.name for run in runs]
        columns = max(1, min(len(runs), LEGEND_LETTERS // max(map(len, names))))
        figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False)
    else:
        figure.suptitle(runs[0].name, fontsize=11)
    width = max(_width(len(run.steps)) for run in runs)
    if width > 1:
        largest = any(series.largest for panel in panels for series in panel.series(runs[0]))
        said = f"points of lines: means over up to {width} steps" + ("; of the oldest token, the largest" * largest)
        figure.supxlabel(said, fontsize=7, color="#555555")


def _draw(axes: Any, panel: Panel, runs: Sequence[Recorded]) -> None:
    labels = _labels(panel, runs)
    for number, run in enumerate(runs):
        for series in panel.series(run):
            if np.isfinite(series.y).any():
                kind = labels.index(series.label)
                colour = COLOURS[(number if len(runs) > 1 else kind) % len(COLOURS)]
                look = {"color": colour, "linestyle": DASHES[kind % len(DASHES)], "markersize": 4}
                _line(axes, series, look, number if len(runs) > 1 else None)
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel(panel.x)
    axes.set_ylabel(f"{labels[0]}: {panel.unit}" if len(labels) == 1 and labels[0] else panel.unit)
    if panel.share:
        axes.set_ylim(-0.03, 1.03)
    elif axes.dataLim.ymin >= 0:
        axes.set_ylim(0, 1.05 * axes.dataLim.ymax or 1.0)
    if len(labels) > 1:
        _legend(axes, labels, alone=len(runs) == 1)


def _labels(panel: Panel, runs: Sequence[Recorded]) -> list[str]:
    """Of all series with figures, in their order, each once."""
    found = [each for run in runs for each in panel.series(run) if np.isfinite(each.y).any()]
    return [*dict.fromkeys(each.label for each in found)]


def _legend(axes: Any, labels: Sequence[str], *, alone: bool) -> None:
    """Below the panel, where it hides no curve. alone: one run; of several, a label is dashes of whatever colour."""
    from matplotlib.lines import Line2D

    looks = [(COLOURS[kind % len(COLOURS)] if alone else "#444444", DASHES[kind % len(DASHES)])
             for kind in range(len(labels))]  # fmt: skip
    handles = [Line2D([], [], color=colour, linestyle=dashes) for colour, dashes in looks]
    columns = len(labels) if len(labels) <= 4 else 3
    axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, frameon=False,
                handlelength=3)  # fmt: skip


def _line(axes: Any, series: Series, look: dict[str, Any], number: int | None) -> None:
    """number: of the run, where there are several; each has its markers at other places."""
    marker = MARKERS[number or 0]
    if series.points:
        assert series.low is not None
        assert series.high is not None
        around = np.stack([np.maximum(series.y - series.low, 0), np.maximum(series.high - series.y, 0)])
        axes.errorbar(series.x, series.y, yerr=around, marker=marker, capsize=2.5, **look)
        return
    x, y, low, high = _thinned(series)
    every = max(1, len(y) // MARKED)
    marked = {} if number is None else {"marker": marker, "markevery": (number % every, every)}
    axes.plot(x, y, **look, **marked)
    alone = _alone(y)
    axes.plot(x[alone], y[alone], color=look["color"], linestyle="", marker=marker, markersize=3)
    if low is not None and high is not None:
        axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)


def _alone(y: Values) -> Any:
    """[n] bool: figures without one before or behind them, which no line shows."""
    known = np.pad(np.isfinite(y), 1)
    return known[1:-1] & ~known[:-2] & ~known[2:]


def _width(count: int) -> int:
    return -(-count // POINTS)


def _thinned(series: Series) -> Iterator[Any]:
    """x, y, low and high with each point standing for as many steps as leave POINTS of them."""
    width = _width(len(series.x))
    yield _means(series.x, width)
    yield (_largest if series.largest else _means)(series.y, width)
    for band in (series.low, series.high):
        yield None if band is None else _means(band, width)


def _rows(values: Values, width: int) -> Values:
    padded = np.full(-(-len(values) // width) * width, np.nan)
    padded[: len(values)] = values
    return padded.reshape(-1, width)


def _means(values: Values, width: int) -> Values:
    """Whatever is NaN left out; NaN where nothing else is there."""
    rows = _rows(values, width)
    known = np.isfinite(rows)
    means: Values = np.full(len(rows), np.nan)
    np.divide(np.where(known, rows, 0.0).sum(axis=1), known.sum(axis=1), out=means, where=known.any(axis=1))
    return means


def _largest(values: Values, width: int) -> Values:
    found: Values = np.fmax.reduce(_rows(values, width), axis=1)
    return found


def _save(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
