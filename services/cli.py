"""`sapo`: the command line. Every command has --help with examples; errors are one sentence and an exit code."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load: end, without a traceback

import asyncio
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sapo_learner.errors import ConfigError, NotFound, SapoError
from services.runtime.client import ControlPlaneClient
from services.runtime.settings import Environment, dump_yaml, load_config
from services.serve import ConfigFile, Set
from services.serve import app as serve_app

signal.signal(signal.SIGINT, signal.default_int_handler)

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="Asynchronous RL post-training with SAPO. Start with `sapo up deploy/examples/demo.yaml`.",
)  # fmt: skip
app.add_typer(serve_app, name="serve")
console = Console()

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or a control plane's URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def up(
    config: ConfigFile,
    overrides: Set = [],  # noqa: B006 (typer wants a list)
    again: Annotated[
        bool, typer.Option("--again", help="If the run is complete or was another one, set it aside and start anew.")
    ] = False,
    start_from: Annotated[
        str | None,
        typer.Option("--from", metavar="POLICY", help="Begin a new run with RUN, RUN@STEP or a model directory."),
    ] = None,
) -> None:
    """Run everything on this machine: Redis, control plane, ingest, learner and rollout workers.

    Ctrl-C drains and stops; the same command goes on where it stopped, also with changed settings: those that may
    change in mid-run count from the next step, the others are refused with a list.

    Examples:

        sapo up deploy/examples/demo.yaml

        sapo up deploy/examples/demo.yaml --set run.seed=1 --set run.name=demo-1

        sapo up deploy/examples/demo.yaml --set run.name=second --from runs/demo@150
    """
    from services.up import up as run_up

    raise typer.Exit(asyncio.run(run_up(load_config(config, overrides), console, again=again, start_from=start_from)))


@app.command("config")
def show_config(
    config: Annotated[Path | None, typer.Argument(metavar="[RUN_YAML]", help="Default: no file, all defaults.")] = None,
    overrides: Set = [],  # noqa: B006
    explain: Annotated[str | None, typer.Option(metavar="KEY", help="Say what a setting or section means.")] = None,
) -> None:
    """Check a configuration and print it in full, every default included; or explain a setting.

    Examples:

        sapo config > run.yaml

        sapo config run.yaml --set objective.tau_neg=1.1

        sapo config --explain training.max_policy_age
    """
    if explain is not None:
        from services.explain import explain as explain_key

        typer.echo("\n".join(explain_key(explain)))
        return
    from services.preflight import check

    typer.echo(dump_yaml(check(load_config(config, overrides))), nl=False)


@app.command()
def status(run: Run, as_json: AsJson = False) -> None:
    """What runs, how far it is, who waits for what.

    Examples:

        sapo status runs/demo

        SAPO_TOKEN=... sapo status http://control-plane:8080 --json
    """
    from services.run_directory import live_services, stopped_status
    from services.view import print_status

    directory = Path(run)
    if (directory / "run.yaml").is_file() and live_services(directory) is None:
        answer = stopped_status(directory)
    else:
        answer = asyncio.run(_ask(run, lambda control: control.status()))
    typer.echo(json.dumps(answer)) if as_json else print_status(console, answer)


@app.command()
def ledger(run: Run, as_json: AsJson = False) -> None:
    """What became of every accepted group; exits with 1 when the ledger does not balance.

    A directory is audited in full, entry by entry, also while it runs or after it stopped; a URL gives counts.

    Examples:

        sapo ledger runs/demo

        sapo ledger runs/demo --json
    """
    if run.startswith(("http://", "https://")):
        report = asyncio.run(_ask(run, lambda control: control.ledger()))
    else:
        from services.run_directory import audit_run

        report = asyncio.run(audit_run(Path(run))).to_dict()
    if as_json:
        typer.echo(json.dumps(report))
    else:
        for key, value in report.items():
            console.print(f"{key:>12}  {value}", highlight=False)
    raise typer.Exit(0 if report["balanced"] else 1)


@app.command()
def health(
    address: Annotated[str, typer.Argument(help="http://HOST:PORT of any service, or HOST:PORT of ingest's gRPC.")],
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 5.0,
) -> None:
    """Ask one process whether it is ready; exits with 0 if it is and with 8 if it is not, saying for what it waits.

    Examples:

        sapo health http://127.0.0.1:8080

        sapo health 127.0.0.1:8081
    """
    from services.health import check

    typer.echo(asyncio.run(check(address, timeout)))


Policy = Annotated[
    str, typer.Argument(metavar="POLICY", help="RUN, RUN@STEP (a kept checkpoint) or a model directory.")
]
RunYaml = Annotated[
    Path | None,
    typer.Option("--config", metavar="RUN_YAML", help="Task and token limit, for a policy that is not a run's."),
]
Temperature = Annotated[float, typer.Option(min=0, help="0: always the most likely token.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampling.")]


@app.command("eval")
def evaluate(
    policy: Policy,
    samples: Annotated[int, typer.Option(min=1, help="At least so many responses, equally many per problem.")] = 2000,
    temperature: Temperature = 1.0,
    config: RunYaml = None,
    overrides: Set = [],  # noqa: B006
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Held-out pass@1 of a policy, with its standard error.

    Examples:

        sapo eval runs/demo

        sapo eval runs/demo@140 --samples 500 --json

        sapo eval path/to/model --set task.name=jsonl --set task.path=problems.jsonl
    """
    from services.offline import evaluate as run_evaluation

    given = load_config(config, overrides)
    result = asyncio.run(run_evaluation(policy, given, samples=samples, temperature=temperature, seed=seed))
    if as_json:
        typer.echo(json.dumps(result))
    else:
        typer.echo(
            f"pass@1 {result['pass_at_1']:.4f} ± {result['standard_error']:.4f}  "
            f"({result['samples']} responses to {result['problems']} held-out problems of {result['task']})"
        )


@app.command()
def sample(
    policy: Policy,
    prompt: Annotated[str, typer.Option(help="The prompt, as text.")],
    count: Annotated[int, typer.Option(min=1, help="Responses.")] = 1,
    temperature: Temperature = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Token limit of a response.")] = 64,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Sample responses to a prompt, with the log-prob of every token.

    Examples:

        sapo sample runs/demo --prompt '7+5-3='

        sapo sample path/to/model --prompt 'Once upon' --count 4 --temperature 0.7 --json
    """
    from services.offline import sample as run_sample

    responses = asyncio.run(
        run_sample(policy, prompt, count=count, temperature=temperature, max_tokens=max_tokens, seed=seed)
    )
    for response in responses:
        if as_json:
            typer.echo(json.dumps(response))
        else:
            typer.echo(f"{prompt}{response['text']}   ({response['logprob']:.3f} nats, {response['finish_reason']})")


async def _ask(run: str, question: Callable[[ControlPlaneClient], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """Put a question to a run's control plane, found by its directory or URL."""
    from services.run_directory import live_services

    if run.startswith(("http://", "https://")):
        url, token = run, Environment().require("token")
    else:
        if not Path(run).is_dir():
            raise NotFound("no such directory", where=run, fix="give runs/NAME or a control plane's URL")
        services = live_services(Path(run))
        if services is None:
            raise NotFound(
                "no `sapo up` runs on this directory", where=run, fix="`sapo ledger` also reads a stopped run"
            )
        url, token = services.control_plane_url, services.token
    async with ControlPlaneClient(url, token, patience=3.0) as control:
        return await question(control)


def main() -> None:
    """Entry point: errors as one line on standard error, and their exit code."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `sapo ... | head` ends quietly
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except SapoError as error:
        print(f"sapo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()


__all__ = ["ConfigError", "app", "main"]
