"""`sapo`: the command line. Every command has --help with examples; errors are one sentence and an exit code."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load: end, without a traceback

import asyncio
import io
import logging
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from sapo_learner.errors import ConfigError, Unavailable
from services import terminal
from services.check_command import app as check_app
from services.dashboard_command import app as dashboard_app
from services.eval_command import Seed
from services.eval_command import app as eval_app
from services.export_command import app as export_app
from services.history import app as history_app
from services.objectives_command import app as objectives_app
from services.plot_command import app as plot_app
from services.runtime import garbage
from services.runtime.settings import dump_yaml, load_config
from services.serve import PLAIN_HELP, ConfigFile, Set
from services.serve import app as serve_app
from services.show_command import app as show_app

signal.signal(signal.SIGINT, signal.default_int_handler)

app = typer.Typer(
    **PLAIN_HELP,
    help="Asynchronous RL post-training with SAPO. Start with `sapo up deploy/examples/demo.yaml`.\n\n"
    "Results go to standard output, progress and errors to standard error; where a command has --json, its result "
    "is one line of JSON.",
    epilog=terminal.exit_code_table(),
)  # fmt: skip
app.add_typer(serve_app, name="serve")
app.add_typer(check_app)
app.add_typer(eval_app)
app.add_typer(objectives_app)
app.add_typer(history_app)
app.add_typer(plot_app)
app.add_typer(show_app)
app.add_typer(dashboard_app)
app.add_typer(export_app)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sapo {metadata.version('sapo')}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Holds the options of `sapo` itself."""


Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or a control plane's URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


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
    back_to: Annotated[
        int | None,
        typer.Option(min=0, metavar="STEP", help="Go on from this kept checkpoint; what came after it is left."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the closing report as JSON; progress goes to standard error.")
    ] = False,
) -> None:
    """Run everything on this machine: Redis, control plane, ingest, learner and rollout workers.

    Ctrl-C drains and stops; the same command goes on where it stopped, also with changed settings: those that may
    change in mid-run count from the next step, the others are refused with a list. Paths in the file are relative to
    the working directory.

    \b
    Examples:
      sapo up deploy/examples/demo.yaml
      sapo up deploy/examples/demo.yaml --set run.seed=1 --set run.name=demo-1
      sapo up deploy/examples/demo.yaml --set run.name=second --from runs/demo@150
      sapo up deploy/examples/demo.yaml --back-to 100 --set optimizer.learning_rate=5e-5
      sapo up run.yaml --json > report.json
    """
    from services.preflight import find_beside
    from services.up import up as run_up

    resolved = load_config(config, overrides)
    find_beside(resolved, config)
    console = terminal.console(stderr=as_json)
    report = terminal.print_json if as_json else None
    run = run_up(resolved, console, again=again, start_from=start_from, back_to=back_to, report=report)
    raise typer.Exit(asyncio.run(run))


@app.command("config")
def show_config(
    config: Annotated[Path | None, typer.Argument(metavar="[RUN_YAML]", help="Default: no file, all defaults.")] = None,
    overrides: Set = [],  # noqa: B006
    explain: Annotated[str | None, typer.Option(metavar="KEY", help="Say what a setting or section means.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a configuration and print it in full, every default included; or explain a setting.

    \b
    Examples:
      sapo config > run.yaml
      sapo config run.yaml --set objective.tau_neg=1.1
      sapo config run.yaml --json
      sapo config --explain training.max_policy_age
    """
    if explain is not None:
        from services.explain import explain as explain_key

        lines = explain_key(explain)
        terminal.print_json({"key": explain, "lines": lines}) if as_json else typer.echo("\n".join(lines))
        return
    from services.preflight import check, find_beside

    resolved = load_config(config, overrides)
    if config is not None:
        find_beside(resolved, config)
    settings = check(resolved, terminal.warn)
    terminal.print_json(settings) if as_json else typer.echo(dump_yaml(settings), nl=False)


@app.command()
def status(run: Run, as_json: AsJson = False) -> None:
    """What runs since when, how far it is, who waits for what.

    Of a directory whose `sapo up` has stopped: how far it got.

    \b
    Examples:
      sapo status runs/demo
      SAPO_TOKEN=... sapo status http://control-plane:8080 --json
    """
    from services.health import ask, processes
    from services.run_directory import live_services, stopped_status
    from services.status_report import print_status

    directory = Path(run)
    services = live_services(directory)
    if services is None and (directory / "run.yaml").is_file():
        answer = stopped_status(directory)
    else:
        answer = asyncio.run(ask(run, lambda control: control.status()))
        answer["dashboard"] = f"{(run if services is None else services.control_plane_url).rstrip('/')}/"
        if services is not None:
            answer["processes"] = asyncio.run(processes(services))
    terminal.print_json(answer) if as_json else print_status(terminal.console(), answer)


@app.command()
def ledger(run: Run, as_json: AsJson = False) -> None:
    """What became of every accepted group; exits with 1 when the ledger does not balance.

    A directory is audited in full, entry by entry, also while it runs or after it stopped; a URL gives counts.

    \b
    Examples:
      sapo ledger runs/demo
      sapo ledger runs/demo --json
    """
    from services.health import ask
    from services.run_directory import audit_run, is_url

    if is_url(run):
        report = asyncio.run(ask(run, lambda control: control.ledger()))
    else:
        report = asyncio.run(audit_run(Path(run))).to_dict()
    if "balanced" not in report:
        raise Unavailable("something answers there that is no control plane", where=run, fix="is it the address?")
    if as_json:
        terminal.print_json(report)
    else:
        typer.echo("\n".join(f"{key:>12}  {value}" for key, value in report.items()))
    raise typer.Exit(0 if report["balanced"] else 1)


@app.command()
def health(
    address: Annotated[
        str,
        typer.Argument(
            help="http://HOST:PORT of any service, or HOST:PORT of ingest's gRPC.", envvar="SAPO_HEALTH_ADDRESS"
        ),
    ],
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the answer.")] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Ask a process if it is ready; exits with 0 if it is and with 8 if it is not, saying for what it waits.

    In an image SAPO_HEALTH_ADDRESS is the container's own service, so that `sapo health` alone is its health check.

    \b
    Examples:
      sapo health http://127.0.0.1:8080
      sapo health 127.0.0.1:8081
      sapo health http://127.0.0.1:8080 --json
    """
    from services.health import waiting_for

    waits = asyncio.run(waiting_for(address, timeout))
    if as_json:
        terminal.print_json({"ready": not waits, "waiting_for": waits})
        raise typer.Exit(Unavailable.exit_code if waits else 0)
    if waits:
        raise Unavailable(f"not ready: waits for {', '.join(waits)}", where=address)
    typer.echo("ready")


Policy = Annotated[
    str, typer.Argument(metavar="POLICY", help="RUN, RUN@STEP (a kept checkpoint) or a model directory.")
]
Temperature = Annotated[float, typer.Option(min=0, help="0: always the most likely token.")]


@app.command()
def sample(
    policy: Policy,
    prompt: Annotated[str, typer.Option(help="The prompt, as text.")],
    count: Annotated[int, typer.Option(min=1, help="Responses.")] = 1,
    temperature: Temperature = 1.0,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Token limit of a response. Default: the run's own, else 64.")
    ] = None,
    seed: Seed = 0,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt as it stands, without the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON per response.")] = False,
) -> None:
    """Sample responses to a prompt, with the log-prob of every token.

    The prompt is given to the policy as its run gives prompts to it: through the chat template, where there is one.

    \b
    Examples:
      sapo sample runs/demo --prompt '7+5-3='
      sapo sample path/to/model --prompt 'Once upon' --count 4 --temperature 0.7 --json
    """
    from services.offline import sample as run_sample

    responses = asyncio.run(
        run_sample(policy, prompt, count=count, temperature=temperature, max_tokens=max_tokens, seed=seed, raw=raw)
    )
    for response in responses:
        if as_json:
            terminal.print_json(response)
        else:
            shown = "" if response["chat"] else prompt  # a chat's answer does not go on where the prompt ends
            typer.echo(f"{shown}{response['text']}   ({response['logprob']:.3f} nats, {response['finish_reason']})")


def main() -> None:
    """Entry point of the process."""
    garbage.loading()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks is no error
    logging.basicConfig(level=logging.WARNING, format="sapo: %(message)s")
    code = terminal.run(app)
    garbage.ending()
    sys.exit(code)


if __name__ == "__main__":
    main()


__all__ = ["ConfigError", "app", "main"]
