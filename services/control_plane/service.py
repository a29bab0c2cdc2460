"""`sapo serve control-plane run.yaml`: owns the run."""

import asyncio
import logging
import os
from pathlib import Path

from services.control_plane.plane import ControlPlane
from services.control_plane.routes import add_routes
from services.runstore import RunStore
from services.runtime.changes import check_changes
from services.runtime.http import probe_app, refuse_taken, serving
from services.runtime.lifecycle import Lifecycle
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.settings import Environment, RunConfig, dump_config

log = logging.getLogger(__name__)


async def serve(lifecycle: Lifecycle, config: RunConfig, environment: Environment, *, listen: str) -> None:
    """Raises Fenced when a newer control plane has taken the run over."""
    token = environment.require("token")
    await asyncio.to_thread(refuse_taken, listen)  # before a running one is fenced off for nothing
    directory = config.run.directory
    directory.mkdir(parents=True, exist_ok=True)
    for change in check_changes(directory, config):
        log.info("changed from here on: %s", change)
    metrics = ControlPlaneMetrics()
    app = probe_app(lifecycle, metrics.registry)
    async with await RunStore.connect(environment.require("redis_url"), config.run.name) as store:
        plane = ControlPlane(config, store, await _take_over(store, directory), metrics)
        _replace(directory / "run.yaml", dump_config(config))
        await plane.open()
        add_routes(app, plane, token)
        async with serving(app, listen) as url:
            log.info("control plane of run %r on %s, files in %s", config.run.name, url, directory)
            lifecycle.ready()
            try:
                await plane.watch(lifecycle)
            finally:
                await plane.close()


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
