"""`sapo check`: the self-test that comes before the first real run."""

import asyncio
from typing import Annotated

import typer

from services import terminal
from services.runtime.settings import load_config
from services.serve import PLAIN_HELP, ConfigFile, Set

app = typer.Typer(**PLAIN_HELP)


@app.command()
def check(
    config: ConfigFile,
    overrides: Set = [],  # noqa: B006
    steps: Annotated[int, typer.Option(min=1, help="Steps with frozen weights, and again with moving ones.")] = 3,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON; progress goes to standard error.")
    ] = False,
) -> None:
    """Do engine and learner agree on log-probs? Run this first: the real stack for a few steps, then a plain verdict.

    The same model, task, sampling and engine as in the file, in a directory of its own that is removed afterwards
    (kept when they do not agree). First the weights are frozen, so that every importance ratio must be 1; then they
    move fast, so that a stale cache shows. Exits with 6 when they do not agree, and with 1 when too little was tested.

    \b
    Examples:
      sapo check run.yaml
      sapo check run.yaml --set sampling.temperature=0.7 --steps 5
      sapo check run.yaml --json > check.json
    """
    from services.check import check as run_check
    from services.preflight import find_beside

    resolved = load_config(config, overrides)
    find_beside(resolved, config)
    console = terminal.console(stderr=as_json)
    raise typer.Exit(
        asyncio.run(run_check(resolved, console, steps=steps, report=terminal.print_json if as_json else None))
    )
