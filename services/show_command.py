"""`sapo show`: one group, token by token, as the objective sees it."""

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sapo_learner.errors import NotFound
from services import terminal
from services.serve import PLAIN_HELP

if TYPE_CHECKING:
    from sapo_learner.policy import Policy

app = typer.Typer(**PLAIN_HELP)


class By(StrEnum):
    gate = "gate"
    ratio = "ratio"
    advantage = "advantage"
    version = "version"
    logprob = "logprob"


@app.command()
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")],
    group: Annotated[str, typer.Argument(metavar="GROUP", help="An entry like 1-57, or draw:57.")],
    by: Annotated[
        By, typer.Option(help="What colours tell; advantage, version and logprob need no policy.", case_sensitive=False)
    ] = By.gate,
    response: Annotated[int | None, typer.Option(min=0, metavar="N", help="Only this one, counted from 0.")] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="POLICY", help="Compare with RUN, RUN@STEP or a model directory.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures of every token as JSON.")] = False,
) -> None:
    """One recorded group: its responses token by token, coloured by what the objective does with each.

    Gate weight and ratio are computed with the kept policy nearest to the one that the group was trained under, and it
    is said which one. Tokens that count for less than half are underlined; without a terminal, in [brackets].

    \b
    Examples:
      sapo show runs/demo 1-57
      sapo show runs/demo draw:57 --by version --response 0
      sapo show runs/demo 1-57 --json
    """
    from services.group_tokens import GivenPolicy, look
    from services.token_view import show as print_group

    given = None if policy is None else GivenPolicy(policy, lambda: _load(policy))
    answer = look(run, group, by.value, given)
    if response is not None:
        count = len(answer["responses"])
        if response >= count:
            raise NotFound(f"no response {response}", where=group, fix=f"the group has 0 to {count - 1}")
        answer["responses"] = [answer["responses"][response]]
    terminal.print_json(answer) if as_json else print_group(terminal.console(), answer)


def _load(name: str) -> "Policy":
    from services.run_directory import load_any_policy

    return asyncio.run(load_any_policy(name))[0]
