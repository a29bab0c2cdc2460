"""`sapo serve NAME`: one service, as in a deployment. Addresses and the token come from the environment."""

import os
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sapo_learner.errors import ConfigError
from services.runtime import garbage, lifecycle
from services.runtime.logging import configure
from services.runtime.processes import end_with_parent
from services.runtime.settings import Environment, load_config

# Plain: a terminal or none, the same words; and nothing boxes in or cuts short what a script reads.
PLAIN_HELP: dict[str, Any] = {
    "no_args_is_help": True, "pretty_exceptions_enable": False, "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}  # fmt: skip
app = typer.Typer(
    **PLAIN_HELP,
    help="Run one service, as in a deployment. Addresses and the token come from the environment: "
    "SAPO_CONTROL_PLANE_URL, SAPO_INGEST_ADDRESS, SAPO_REDIS_URL, SAPO_TOKEN.\n\n"
    "Logs go to standard error: JSON lines, or text on a terminal. SAPO_LOG_FORMAT=text|json says otherwise; "
    "SAPO_LOG_LEVEL=debug also tells the way of every group.\n\n"
    "\b\nExamples:\n  sapo serve control-plane run.yaml --listen 0.0.0.0:8080\n  sapo serve rollout --name rollout-7",
)

Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; may be repeated.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="RUN_YAML", help="The run's configuration.")]
HttpListen = Annotated[str, typer.Option(metavar="HOST:PORT", help="Probes and metrics.")]
ANY_PORT = "127.0.0.1:0"


@app.command("control-plane")
def serve_control_plane(
    config: ConfigFile,
    overrides: Set = [],  # noqa: B006
    listen: Annotated[str, typer.Option(metavar="HOST:PORT")] = "127.0.0.1:8080",
    http_listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Probes and metrics also here, never under TLS.")
    ] = "",
) -> None:
    """The service that owns the run. Needs SAPO_REDIS_URL, and SAPO_TOKEN or SAPO_TOKENS_FILE.

    \b
    Examples:
      sapo serve control-plane run.yaml --listen 0.0.0.0:8080
    """
    from services import hub
    from services.control_plane.service import serve

    given = load_config(config, overrides)
    resolved = hub.pinned(given)
    hub.remember(resolved, given.policy)
    _serve("control-plane", lambda life: serve(life, resolved, Environment(), listen=listen, http_listen=http_listen))


@app.command("ingest")
def serve_ingest(
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="gRPC.")] = "127.0.0.1:8081",
    http_listen: HttpListen = ANY_PORT,
    health_listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="gRPC health also here, never under TLS.")
    ] = "",
) -> None:
    """The gRPC door of the log. Needs SAPO_CONTROL_PLANE_URL, SAPO_REDIS_URL and SAPO_TOKEN.

    \b
    Examples:
      sapo serve ingest --listen 0.0.0.0:8081 --http-listen 0.0.0.0:9101
    """
    from services.ingest.service import serve

    begin = partial(serve, listen=listen, http_listen=http_listen, health_listen=health_listen)
    _serve("ingest", lambda life: begin(life, Environment()))


@app.command("learner")
def serve_learner(
    http_listen: HttpListen = ANY_PORT,
    from_step: Annotated[
        int | None, typer.Option("--from", min=0, metavar="STEP", help="Go on from this kept checkpoint.")
    ] = None,
) -> None:
    """Trains. Needs SAPO_CONTROL_PLANE_URL, SAPO_REDIS_URL and SAPO_TOKEN. Exits with 0 once the run is finished.

    Goes on from the newest whole checkpoint; with --from from an older one, which leaves what came after it.

    \b
    Examples:
      sapo serve learner --http-listen 0.0.0.0:9102
      sapo serve learner --from 120
      torchrun --nproc-per-node 8 -m services.cli serve learner      one process for each GPU
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # without torchrun's agent nobody would end or restart this rank
        end_with_parent()
    from services.learner.ranks import follow, follows
    from services.learner.service import serve

    if follows():
        configure(f"learner rank {os.environ['RANK']}")
        garbage.loaded()
        raise typer.Exit(follow())
    _serve("learner", lambda life: serve(life, Environment(), http_listen=http_listen, from_step=from_step))


@app.command("rollout")
def serve_rollout(
    name: Annotated[str, typer.Option(help="Unique among the run's workers.")] = "rollout-0",
    http_listen: HttpListen = ANY_PORT,
) -> None:
    """Samples. Needs SAPO_CONTROL_PLANE_URL, SAPO_INGEST_ADDRESS and SAPO_TOKEN. Join and leave at any time.

    \b
    Examples:
      sapo serve rollout --name rollout-7
    """
    from services.rollout.service import serve
    from services.runtime.api import check_worker_name

    try:
        check_worker_name(name)
    except ValueError as error:
        raise ConfigError(str(error), where="--name", fix="for example rollout-0") from None
    _serve(name, lambda life: serve(life, Environment(), name=name, http_listen=http_listen))


def _serve(name: str, service: Callable[[lifecycle.Lifecycle], Awaitable[None]]) -> None:
    configure(name)
    garbage.loaded()
    raise typer.Exit(lifecycle.run(service))
