"""`sapo eval`: how good a policy is, on a suite or on the held-out prompts of its run."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services import terminal
from services.runtime.settings import load_config
from services.serve import PLAIN_HELP, Set

if TYPE_CHECKING:
    from services.offline import Progress
    from services.suites import Suite

app = typer.Typer(**PLAIN_HELP)
ROWS = 50  # of the table of problems
RunYaml = Annotated[
    Path | None,
    typer.Option("--config", metavar="RUN_YAML", help="Task and token limit, for a policy that is not a run's."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampling.")]


@app.command("eval")
def evaluate(
    context: typer.Context,
    policy: Annotated[
        str | None, typer.Argument(metavar="POLICY", help="RUN, RUN@STEP (a kept checkpoint) or a model directory.")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="What to ask. Default: the run's own held-out prompts.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Responses per problem. Default: the suite's; without one, as many as make 2000 in all."
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0: always the most likely token. Default: the suite's, else 1.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Token limit of a response. Default: the suite's, else the run's.")
    ] = None,
    config: RunYaml = None,
    overrides: Set = [],  # noqa: B006 (typer wants a list)
    seed: Seed = 0,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Where the suite's data are: a file, a directory, or ID@COMMIT on the hub."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where every response is kept. Default, with --suite: evaluations/..."),
    ] = None,
    list_suites: Annotated[bool, typer.Option("--list", help="Print the suites that come along.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """pass@1 and pass@k of a policy, with 95 % intervals, and a table of the problems.

    Every response is written to DIR as it is done. After Ctrl-C the same command goes on where it stopped. The same
    policy with the same seed gives the same figures.

    \b
    Examples:
      sapo eval runs/demo
      sapo eval runs/demo@140 --samples 4 --json
      sapo eval --list
      sapo eval runs/demo --suite arithmetic
      sapo eval path/to/model --suite aime25 --data aime25.jsonl --samples 4 --out aime25
      sapo eval path/to/model --set task.name=jsonl --set task.path=problems.jsonl
    """
    if list_suites:
        _list(as_json)
        return
    if policy is None:
        raise typer.BadParameter("Missing argument 'POLICY'.", ctx=context)
    if data is not None and suite is None:
        raise typer.BadParameter("--data belongs to --suite.", ctx=context)
    from services.offline import Plan
    from services.offline import evaluate as run_evaluation

    given = load_config(config, overrides) if config or overrides else None
    plan = Plan(given, _suite(suite, data), samples, temperature, max_tokens, seed, out)
    shown = _Shown()
    try:
        with shown:
            result = asyncio.run(run_evaluation(policy, plan, shown))
    except KeyboardInterrupt:
        shown.interrupted()
        raise
    terminal.print_json(result) if as_json else _print(result)


def _suite(name: str | None, data: str | None) -> "Suite | None":
    from services.suites import load

    if name is None:
        return None
    suite = load(name)
    if not suite.checked:
        terminal.warn(
            f"suite {suite.name} is not checked: nobody here has held it against its data"
            f"{f' ({suite.source})' if suite.source else ''}; look at the first answers"
        )
    return suite.with_data(data) if data else suite


class _Shown:
    """Progress on standard error: a bar on a terminal, else a line for every tenth of the problems."""

    def __init__(self) -> None:
        from rich import progress as bars

        self._console = terminal.console(stderr=True)
        self._bar = bars.Progress(
            bars.BarColumn(), bars.MofNCompleteColumn(), bars.TextColumn("problems   {task.fields[rate]}"),
            bars.TimeRemainingColumn(), console=self._console, disable=not self._console.is_terminal, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None, rate="")
        self._last: Progress | None = None
        self._tenths = -1

    def __enter__(self) -> "_Shown":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, progress: "Progress") -> None:
        rate = f"pass@1 {progress.correct / progress.responses:.3f}" if progress.responses else ""
        self._bar.update(self._task, total=progress.total, completed=progress.done, rate=rate)
        tenths = 10 * progress.done // progress.total
        if not self._console.is_terminal and tenths != self._tenths:
            terminal.warn(f"{progress.done} of {progress.total} problems   {rate}".rstrip())
        self._last, self._tenths = progress, tenths

    def interrupted(self) -> None:
        if self._last and self._last.out:
            terminal.warn(
                f"{self._last.done} of {self._last.total} problems are in {self._last.out}; the same command goes on"
            )


def _list(as_json: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from services.suites import shipped

    rows = [each.model_dump(mode="json") for each in shipped()]
    if as_json:
        terminal.print_json(rows)
        return
    table = Table("name", "what", "samples", "checked", "source", box=None, padding=(0, 3, 0, 0))
    for row in rows:
        cells = (row["name"], row["title"], str(row["samples"]), "yes" if row["checked"] else "no", row["source"])
        table.add_row(*map(Text, cells))
    terminal.console().print(table)


def _print(result: dict[str, Any]) -> None:
    console = terminal.console()
    console.print(_problems(result["per_problem"]))
    if (more := len(result["per_problem"]) - ROWS) > 0:
        typer.echo(f"... and {more} more problems" + (f" in {result['out']}/summary.json" if result["out"] else ""))
    typer.echo("")
    if len(result["by_task"]) > 1:
        for label, each in result["by_task"].items():
            typer.echo(f"{label}: {_rate('pass@1', each['pass_at_1'], each)}")
    typer.echo(
        f"{_rate('pass@1', result['pass_at_1'], result)}  ({result['samples']} responses to {result['problems']} "
        f"problems of {result['task']}, {result['mean_tokens']:.0f} tokens each)"
    )
    for k, each in result.get("pass_at_k", {}).items():
        typer.echo(_rate(f"pass@{k}", each["mean"], each))
    if result["out"]:
        typer.echo(f"every response: {result['out']}/samples.jsonl")


def _rate(name: str, mean: float, spread: dict[str, Any]) -> str:
    low, high = spread["interval_95"]
    return f"{name} {mean:.4f} ± {spread['standard_error']:.4f}  (95 %: {low:.3f} to {high:.3f})"


def _problems(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 3, 0, 0))
    for name in ("problem", "correct", "of", "pass@1", "mean tokens"):
        table.add_column(name, justify="left" if name == "problem" else "right")
    for row in rows[:ROWS]:
        rate = f"{row['correct'] / row['samples']:.2f}"
        cells = row["problem"], str(row["correct"]), str(row["samples"]), rate, f"{row['mean_tokens']:.0f}"
        table.add_row(*map(Text, cells))
    return table
