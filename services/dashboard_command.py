"""`sapo dashboard`: the page of a run in the browser, while it goes on and when it has stopped."""

import secrets
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from services.runtime.auth import Tokens, page_address
from services.serve import PLAIN_HELP

app = typer.Typer(**PLAIN_HELP)


@app.command()
def dashboard(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")],
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where a stopped run is served; port 0 is a free one.")
    ] = "127.0.0.1:0",
) -> None:
    """Print the address of a run's dashboard; of a run that has stopped, serve it until Ctrl-C.

    \b
    Examples:
      sapo dashboard runs/demo
      sapo dashboard runs/demo --listen 127.0.0.1:8080
    """
    from services.run_directory import live_services, run_config
    from services.runtime.lifecycle import run as run_service

    if services := live_services(run):
        typer.echo(page_address(services.control_plane_url, services.token))
        return
    run_config(run)  # says so when it is no run
    raise typer.Exit(run_service(lambda lifecycle: serve_stopped(lifecycle, run, listen)))


async def serve_stopped(lifecycle: Any, run: Path, listen: str) -> None:
    """The page of a run that nobody serves, from its directory, under a token of its own."""
    from prometheus_client import CollectorRegistry

    from services.control_plane.dashboard.groups import KeptGroups
    from services.control_plane.dashboard.history import History
    from services.control_plane.dashboard.routes import add_dashboard
    from services.control_plane.record import read
    from services.run_directory import stopped_status
    from services.runtime.http import Door, probe_app, serving

    history, token = History(), secrets.token_urlsafe(24)
    for line in read(run / "record.jsonl"):
        history.hear(line)
    view = _view(stopped_status(run))

    async def look() -> dict[str, Any]:
        return view | {"time": time.time()}

    page = probe_app(lifecycle, CollectorRegistry())
    page.add_middleware(Door, tokens=Tokens.one(token))
    add_dashboard(page, Tokens.one(token), history, KeptGroups(run / "groups"), look, lifecycle.stopping.is_set)
    async with serving(page, listen) as url:
        lifecycle.ready()
        typer.echo(f"{page_address(url, token)}\nserving until Ctrl-C")
        await lifecycle.stopping.wait()


def _view(status: dict[str, Any]) -> dict[str, Any]:
    """The page's moment: nothing runs any more."""
    kept = {name: status[name] for name in ("run", "state", "steps", "step")}
    nothing = {"version": None, "groups_ready": None, "open_leases": None, "ledger": None}
    return kept | nothing | {"workers": [], "gone": [], "services": [], "notes": [], "alerts": []}
