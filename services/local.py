"""`sapo up`: every service of a run as processes on this machine, started, watched, restarted, and stopped in order.

The processes, wire and files are those of a deployment; only the numbers are small. A process that dies is restarted
with back-off; one that dies three times within a minute while the run makes no progress stops the run, and so does one
that says that its configuration is wrong: trying again would not help.
"""

import asyncio
import logging
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from sapo_learner.errors import ConfigError, Forbidden, Mismatch, SapoError, Unauthenticated, Unavailable
from services.local_child import DEATHS, Child
from services.printable import printable
from services.process_logs import ProcessLogs
from services.prometheus_targets import write_targets
from services.rollout.engines.vllm_adapter import require_vllm
from services.run_directory import LocalServices, forget_services, live_services
from services.runstore import EmbeddedRedis
from services.runtime.auth import page_address
from services.runtime.client import ControlPlaneClient
from services.runtime.environment import OF_A_DEPLOYMENT
from services.runtime.processes import die_with_parent, exit_reason
from services.runtime.run_identity import identity
from services.runtime.settings import RunConfig, dump_config

log = logging.getLogger(__name__)

VLLM_START_SECONDS = 60.0  # which a worker needs before it can die of anything
HOPELESS = tuple(each.exit_code for each in (ConfigError, Unauthenticated, Forbidden, Mismatch))
LAST_LINES = 12
LITTLE_BYTES = 64 << 20  # of a disk that may have been full a moment ago
REQUESTED_CONFIG = "requested.yaml"  # the control plane makes it run.yaml once it has found it fit


class LocalRun:
    """The processes of one run. `status` is the control plane's newest answer, for whoever draws it."""

    def __init__(self, config: RunConfig, *, workers: int, back_to: int | None = None) -> None:
        """back_to: step of a kept checkpoint that the learner goes on from, instead of the newest."""
        self.config, self.directory = config, config.run.directory.resolve()
        if live_services(self.directory):
            raise Unavailable(
                "another `sapo up` runs on this directory", where=str(self.directory), fix="stop it first"
            )
        if config.engine.name == "vllm":
            require_vllm()  # rather than have every worker say so half a minute later
        self._logs = ProcessLogs(self.directory / "logs")
        self._write_config()
        self._redis = None if os.environ.get("SAPO_REDIS_URL") else EmbeddedRedis(self.directory / "redis")
        self._token = os.environ.get("SAPO_TOKEN") or secrets.token_urlsafe(24)
        self._reserved: list[socket.socket] = []
        self.status: dict[str, Any] = {}
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers: list[asyncio.Task[None]] = []
        self._stopping = False
        control, self._ingest_address = self._reserve(), self._reserve()
        self.control = ControlPlaneClient(f"http://{control}", self._token, patience=5.0)
        self.children: dict[str, Child] = {}
        if self._redis:
            self.children["redis"] = Child("redis", [])
        self._add("control-plane", [str(self.directory / REQUESTED_CONFIG), "--listen", control], http=control)
        self._add("ingest", ["--listen", self._ingest_address])
        self._add("learner", [])
        self.children["learner"].once = [] if back_to is None else ["--from", str(back_to)]
        self._newest_saved = self._saved()
        for index in range(workers):
            self._add("rollout", ["--name", f"rollout-{index}"], name=f"rollout-{index}")
            if self.config.engine.name == "vllm":
                self.children[f"rollout-{index}"].within_seconds += (DEATHS - 1) * VLLM_START_SECONDS

    def _write_config(self) -> None:
        """For the control plane: the configuration with the run's directory made absolute."""
        run = self.config.run.model_copy(update={"dir": str(self.directory)})
        (self.directory / REQUESTED_CONFIG).write_text(dump_config(self.config.model_copy(update={"run": run})))

    def _add(self, service: str, options: list[str], *, name: str = "", http: str = "") -> None:
        address = http or self._reserve()
        probes = [] if http else ["--http-listen", address]
        command = [sys.executable, "-m", "services.cli", "serve", service, *options, *probes]
        if service == "learner" and (ranks := self.config.parallel.processes) > 1:
            command = [sys.executable, "-m", "services.learner.launch", str(ranks), *options, *probes]
        self.children[name or service] = Child(name or service, command, http=address)

    def _reserve(self) -> str:
        """A free port that stays ours across restarts of the process that listens on it."""
        holder = socket.socket()
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        self._reserved.append(holder)
        return f"127.0.0.1:{holder.getsockname()[1]}"

    @property
    def dashboard(self) -> str:
        """Address of the page, login included."""
        return page_address(self.control.url, self._token)

    # ---- start

    async def start(self) -> None:
        for child in self.children.values():
            if child.name == "redis" and self._redis:
                child.command = self._redis.command()
            await self._spawn(child)
            self._watchers.append(asyncio.create_task(self._watch(child), name=f"watch {child.name}"))
        self._write_services()
        self._watchers.append(asyncio.create_task(self._poll(), name="poll"))
        for task in self._watchers:
            task.add_done_callback(self._watcher_ended)

    def _saved(self) -> int:
        """Newest fencing token of a checkpoint: a learner that went back on purpose saves under its own at once."""
        names = (path.name for path in (self.directory / "checkpoints").glob("step-*"))
        return max((int(name.rpartition("-")[2]) for name in names), default=0)

    async def _spawn(self, child: Child) -> None:
        if child.once and self._saved() > self._newest_saved:
            child.once = []
        if child.name == "redis" and self._redis:
            child.command = self._redis.command()
        with self._logs.open(child.name) as output:
            child.process = await asyncio.create_subprocess_exec(
                *child.command, *child.once, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                env=self._environment(child.name), start_new_session=True, preexec_fn=die_with_parent(),
            )  # fmt: skip
        child.state = "running"

    def _environment(self, process: str) -> dict[str, str]:
        gpus = self.config.local.visible_gpus(process)
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus else {}
        return (
            {name: value for name, value in os.environ.items() if name not in OF_A_DEPLOYMENT}
            | visible
            | {
                "SAPO_CONTROL_PLANE_URL": self.control.url,
                "SAPO_INGEST_ADDRESS": self._ingest_address,
                "SAPO_REDIS_URL": self._redis_url,
                "SAPO_TOKEN": self._token,
                # Several processes share this machine's cores: idle OpenMP threads must not spin on them.
                "OMP_NUM_THREADS": str(self.config.training.threads),
                "OMP_WAIT_POLICY": "PASSIVE",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONUNBUFFERED": "1",
            }
        )

    @property
    def _redis_url(self) -> str:
        return self._redis.url if self._redis else os.environ["SAPO_REDIS_URL"]

    @property
    def _run(self) -> str:
        """As logs call it, too: figures of two runs of one name are two runs' figures."""
        return f"{self.config.run.name}-{identity(self.directory)}"

    def _write_services(self) -> None:
        LocalServices(
            supervisor_pid=os.getpid(),
            supervisor_started=psutil.Process().create_time(),
            control_plane_url=self.control.url,
            ingest_address=self._ingest_address,
            redis_url=self._redis_url,
            token=self._token,
            processes={each.name: {"pid": each.pid, "http": each.http} for each in self.children.values()},
        ).write(self.directory)
        probed = {each.name: each.http for each in self.children.values() if each.http}
        write_targets(self.directory, self._run, probed)

    # ---- watch

    async def _watch(self, child: Child) -> None:
        """Restart the child whenever it dies, until it has done its work, is hopeless, or the run is stopped."""
        while True:
            assert child.process is not None
            code = await child.process.wait()
            if self._stopping:
                return
            if code == 0 and child.name == "learner" and await self._trained():
                child.state = "done"
                return
            child.state = f"died ({exit_reason(code)})"
            child.deaths.append((time.monotonic(), self._progress()))
            if code in HOPELESS or child.keeps_dying:
                self._fail(child, code)
                return
            child.restarts += 1
            log.warning("%s died (%s); restarting", child.name, exit_reason(code, meaning=True))
            await asyncio.sleep(min(5.0, 0.2 * 2 ** len(child.deaths)))
            if self._stopping:
                return
            await self._spawn(child)
            self._write_services()

    async def _trained(self) -> bool:
        """Whether the learner has done its last step: it also exits with 0 when somebody asks it to stop."""
        try:
            status = await self.control.status()
        except SapoError:
            return False
        return int(status["learner"]["step"]) >= int(status["steps"])

    def _progress(self) -> tuple[int, int]:
        return (self.status.get("learner", {}).get("step", -1), self.status.get("accepted", -1))

    def _fail(self, child: Child, code: int) -> None:
        lines = self._logs.last_lines(child.name, LAST_LINES)
        kind = next((each for each in SapoError.__subclasses__() if each.exit_code == code), SapoError)
        error = kind(
            f"{child.name} died ({exit_reason(code, meaning=True)}) and restarting does not help; its last words:\n  "
            + "\n  ".join(lines),
            fix=f"the whole log: {self._logs.path(child.name)}{_little_room(self.directory)}",
        )
        if not self._failure.done():
            self._failure.set_exception(error)

    def _watcher_ended(self, task: asyncio.Task[None]) -> None:
        """A watcher that breaks would leave its process unwatched: the run ends with what broke it."""
        if not task.cancelled() and (error := task.exception()) and not self._failure.done():
            self._failure.set_exception(SapoError(f"{task.get_name()} failed: {error}"))

    async def _poll(self) -> None:
        while True:
            try:
                self.status = printable(await self.control.status())
            except SapoError as error:
                log.debug("no status: %s", error)
            self._logs.shorten()
            await asyncio.sleep(0.4)

    async def finished(self, stop: asyncio.Event, draw: Callable[["LocalRun"], None]) -> bool:
        """Wait for the run's end, calling `draw` meanwhile; False when asked to stop before. Raises what ended it."""
        while True:
            try:
                draw(self)
            except (TypeError, ValueError, KeyError) as error:  # a figure that is missing or not a number
                log.debug("the view could not be drawn: %s", error)
            if self._failure.done():
                self._failure.result()
            if stop.is_set():
                return False
            # The status may be what an earlier session left.
            if self.status.get("state") == "finished" and self.children["learner"].state == "done":
                return True
            await asyncio.wait([self._failure], timeout=0.25)

    # ---- stop

    async def stop(self) -> None:
        """Drain in order: samplers hand back, the learner checkpoints, then everything that serves them."""
        self._stopping = True
        if self._failure.done():
            self._failure.exception()  # raised by `finished`, or overtaken by whatever else ended the run
        workers = [each for name, each in self.children.items() if name.startswith("rollout")]
        await asyncio.gather(*(each.terminate() for each in workers))
        for name in ("learner", "ingest", "control-plane", "redis"):
            if name in self.children:
                await self.children[name].terminate()
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await self.control.__aexit__()
        for holder in self._reserved:
            holder.close()
        forget_services(self.directory)
        write_targets(self.directory, self._run, {})


def _little_room(directory: Path) -> str:
    """A full disk also takes the last words that would have said so."""
    free = shutil.disk_usage(directory).free
    return f"; its disk has only {free >> 20} MiB left: make room" if free < LITTLE_BYTES else ""
