"""`sapo serve control-plane run.yaml`: owns the run."""

import logging
import os
from contextlib import AsyncExitStack
from pathlib import Path

from fastapi import FastAPI, Response
from prometheus_client import CollectorRegistry

from sapo_learner.errors import Unavailable
from services.control_plane.dashboard.pages import starting_page
from services.control_plane.plane import ControlPlane
from services.control_plane.routes import add_routes
from services.runstore import RunStore
from services.runtime.auth import Tokens
from services.runtime.changes import check_changes
from services.runtime.http import Door, Front, probe_app, serving
from services.runtime.lifecycle import Lifecycle
from services.runtime.logging import of_run
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.run_identity import identity
from services.runtime.settings import Environment, RunConfig, save_config

log = logging.getLogger(__name__)


async def serve(
    lifecycle: Lifecycle, config: RunConfig, environment: Environment, *, listen: str, http_listen: str = ""
) -> None:
    """http_listen: where probes and metrics are served as well, without TLS.

    Raises Fenced when a newer control plane has taken the run over.
    """
    redis_url, tokens = environment.require("redis_url"), environment.tokens()
    directory = config.run.directory
    directory.mkdir(parents=True, exist_ok=True)
    for change in check_changes(directory, config):
        log.info("changed from here on: %s", change)
    metrics = ControlPlaneMetrics()
    app = probe_app(lifecycle, metrics.registry)
    front = Front(_starting_app(lifecycle, metrics.registry, tokens))
    # The address first: a port in use is said before a running control plane is fenced off for nothing.
    async with AsyncExitStack() as closed_last, serving(front, listen, environment.tls) as url:
        if http_listen:
            await closed_last.enter_async_context(serving(probe_app(lifecycle, metrics.registry), http_listen))
        waiting, patience = lifecycle.peer("Redis"), environment.patience_seconds
        store = await closed_last.enter_async_context(
            await RunStore.connect(redis_url, config.run.name, patience=patience, waiting=waiting)
        )
        known = identity(directory)
        of_run(run := f"{config.run.name}-{known}")
        await store.claim(known)
        plane = ControlPlane(config, store, await _take_over(store, directory), metrics)
        save_config(config)
        await plane.open()
        add_routes(app, plane, tokens, run)
        front.app = app
        log.info("control plane of run %r on %s, files in %s", config.run.name, url, directory)
        lifecycle.ready()
        try:
            await plane.watch(lifecycle)
        finally:
            await plane.close()


def _starting_app(lifecycle: Lifecycle, registry: CollectorRegistry, tokens: Tokens) -> FastAPI:
    """Probes, and a refusal that says what is missing, until the run's state can be read."""
    app = probe_app(lifecycle, registry)
    app.add_middleware(Door, tokens=tokens)

    @app.api_route("/v1/{path:path}", methods=["GET", "HEAD", "POST", "PUT"])
    async def not_yet(path: str) -> None:
        waiting = "; ".join(lifecycle.waiting_for)
        raise Unavailable(f"not ready: {waiting}", where="control plane", fix="try again")

    @app.api_route("/", methods=["GET", "HEAD"])
    async def starting() -> Response:
        return starting_page(lifecycle.waiting_for)

    return app


async def _take_over(store: RunStore, directory: Path) -> int:
    """A token newer than every one before, also when Redis was lost in between: the disk remembers."""
    path = directory / "control-plane.token"
    token = await store.acquire_token("control-plane", floor=int(path.read_text()) if path.exists() else 0)
    _replace(path, str(token))
    return token


def _replace(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
