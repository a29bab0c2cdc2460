"""`sapo plot`: how runs went, as pictures."""

from pathlib import Path
from typing import Annotated

import typer

from services import terminal
from services.serve import PLAIN_HELP

app = typer.Typer(**PLAIN_HELP)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs, also running ones.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the pictures go. Default: plots in the first RUN.")
    ] = None,
    metrics: Annotated[
        str, typer.Option(metavar="A,B", help="Only these panels; an unknown name lists all. Default: all.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths as JSON.")] = False,
) -> None:
    """Draw how runs went: learning.png, health.png, speed.png, objective.png; prints their paths.

    Several runs are laid over one another, each with its colour. Needs matplotlib: pip install 'sapo[plot]'.

    \b
    Examples:
      sapo plot runs/demo
      sapo plot runs/demo runs/demo-1 --out compared
      sapo plot runs/demo --metrics reward,pass_at_1
    """
    from services.curves import Recorded
    from services.plotting import plot as draw

    recorded = [Recorded.read(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    wanted = [each.strip() for each in metrics.split(",") if each.strip()]
    paths = [str(path) for path in draw(recorded, out or runs[0] / "plots", wanted)]
    terminal.print_json({"files": paths}) if as_json else typer.echo("\n".join(paths))


def _names(runs: list[Path]) -> list[str]:
    """The directories' own; where two are the same, the paths as given."""
    own = [run.resolve().name for run in runs]
    return own if len({*own}) == len(own) else [str(run) for run in runs]
