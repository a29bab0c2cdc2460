"""`sapo archive`, `sapo replay` and `sapo skip`: a run's recorded past."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from sapo_learner.errors import ConfigError, NotFound
from services import terminal
from services.serve import PLAIN_HELP

app = typer.Typer(**PLAIN_HELP)

Directory = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def archive(
    run: Directory,
    stats: Annotated[bool, typer.Option("--stats", help="Entries, tokens, segments, bytes. The default.")] = False,
    show: Annotated[
        str | None, typer.Option(metavar="GROUP", help="One group: an entry like 1-57, or draw:57.")
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete what no kept checkpoint needs; replay from the start ends with it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Everything the run was trained on: how much there is, one group in full, or the end of what is not needed.

    \b
    Examples:
      sapo archive runs/demo
      sapo archive runs/demo --show 1-57
      sapo archive runs/demo --show draw:57 --json
      sapo archive runs/demo --prune
    """
    from services import archive_tools

    if stats + (show is not None) + prune > 1:
        raise ConfigError("more than one thing to do", where="sapo archive", fix="give --stats, --show or --prune")
    _require(run)
    if show is not None:
        answer = archive_tools.show(run, show)
    else:
        answer = archive_tools.prune(run) if prune else archive_tools.stats(run)
    terminal.print_json(answer) if as_json else _print(answer)


@app.command()
def replay(
    run: Directory,
    start: Annotated[int, typer.Option("--from", min=0, metavar="STEP", help="A kept checkpoint's step.")] = 0,
    until: Annotated[int | None, typer.Option(min=1, metavar="STEP", help="Default: the archive's end.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare every published policy and kept checkpoint.")
    ] = True,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the policy as a model directory.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train once more from the recorded log alone, and compare: the same log gives the same weights.

    Needs no service and no inference server. Exits with 6, naming the first step that differs.

    \b
    Examples:
      sapo replay runs/demo
      sapo replay runs/demo --from 100 --until 120
      sapo replay runs/demo --until 50 --out policy-50
    """
    from services.replay import replay as run_replay

    _require(run)
    console = terminal.console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("replaying", total=None)

        def progress(step: int, last: int) -> None:
            shown.update(task, completed=step - start, total=last - start, description=f"step {step}/{last}")

        report = run_replay(run, start=start, until=until, verify=verify, out=out, progress=progress)
    terminal.print_json(report.to_dict()) if as_json else typer.echo(report.sentence())


@app.command()
def skip(
    run: Directory,
    entry: Annotated[str, typer.Argument(metavar="ENTRY", help="The entry's id, such as 1-57.")],
    reason: Annotated[str, typer.Option(help="Kept with the run.")] = "",
) -> None:
    """Take an entry out of training that the learner dies of; it counts as `skipped`, in replays too.

    Only while no learner runs, and only for an entry that no checkpoint contains.

    \b
    Examples:
      sapo skip runs/demo 1-57 --reason 'crashes the attention kernel'
    """
    from services import archive_tools

    _require(run)
    archive_tools.skip(run, entry, reason)
    typer.echo(f"entry {entry} will be skipped; start the run again")


def _require(run: Path) -> None:
    if not (run / "archive").is_dir():
        raise NotFound("no archive there", where=str(run), fix="give a run's directory on the learner's machine")


def _print(answer: dict[str, Any], indent: str = "") -> None:
    """Keys and values, one a line, lists and groups of them indented."""
    for key, value in answer.items():
        rows = value if isinstance(value, list) and value and isinstance(value[0], dict) else [value]
        for row in rows:
            if isinstance(row, dict):
                typer.echo(f"{indent}{key}")
                _print(row, indent + "  ")
            else:
                typer.echo(f"{indent}{key:<20} {'-' if row is None else row}")
