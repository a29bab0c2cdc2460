"""`sapo serve control-plane run.yaml`: owns the run."""

import asyncio
import logging

from services.control_plane.plane import ControlPlane
from services.control_plane.routes import add_routes
from services.runstore import RunStore
from services.runtime.http import probe_app, serving
from services.runtime.lifecycle import Lifecycle
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.settings import Environment, RunConfig, dump_config

log = logging.getLogger(__name__)


async def serve(lifecycle: Lifecycle, config: RunConfig, environment: Environment, *, listen: str) -> None:
    token = environment.require("token")
    directory = config.run.directory
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.yaml").write_text(dump_config(config))
    metrics = ControlPlaneMetrics()
    app = probe_app(lifecycle, metrics.registry)
    async with await RunStore.connect(environment.require("redis_url"), config.run.name) as store:
        fence = await store.acquire_token("control-plane")
        plane = ControlPlane(config, store, fence, metrics)
        await plane.open()
        add_routes(app, plane, token)
        async with serving(app, listen) as url:
            log.info("control plane of run %r on %s, files in %s", config.run.name, url, directory)
            lifecycle.ready()
            metrics_task = asyncio.create_task(_observe(plane, metrics))
            await lifecycle.stopping.wait()
            metrics_task.cancel()
            await plane.close()


async def _observe(plane: ControlPlane, metrics: ControlPlaneMetrics) -> None:
    while True:
        metrics.observe(await plane.status())
        await asyncio.sleep(2)
