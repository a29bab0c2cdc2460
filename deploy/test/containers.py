"""Podman as a machine without systemd runs it, and Compose on top of it."""

import contextlib
import json
import os
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[2]
# runc: crun refuses hybrid cgroups. ulimits: podman's own are more than a container of a container may set.
CONFIGURATION = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime = "runc"
[network]
network_backend = "netavark"
"""


class Failed(Exception):
    """A command ended with an error; the text is what it said."""


def run(*words: str | Path, timeout: float = 600, environment: dict[str, str] | None = None) -> str:
    """Standard output; raises Failed."""
    variables = os.environ | (environment or {})
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=variables)
    if done.returncode:
        raise Failed(f"{shlex.join(map(str, words))}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def build(tag: str, dockerfile: Path, volumes: list[str], *arguments: str) -> None:
    """volumes: what pip and apt need to reach their indexes from here, as for `podman -v`; never part of an image."""
    mounts = [
        word for volume in volumes for word in ("-v", f"{volume}:ro" if ":" in volume else f"{volume}:{volume}:ro")
    ]
    given = [word for argument in arguments for word in ("--build-arg", argument)]
    run(
        "buildah", "bud", "--layers", "--format", "docker", "--network", "host", *mounts, *given, "-t", tag,
        "-f", dockerfile, ROOT, timeout=3600, environment={"BUILDAH_ISOLATION": "chroot"},
    )  # fmt: skip


@contextlib.contextmanager
def podman() -> Iterator[None]:
    """Podman set up, and its API as Docker's, for as long as this lasts."""
    with tempfile.TemporaryDirectory() as directory:
        configuration, socket = Path(directory) / "containers.conf", f"unix://{directory}/podman.sock"
        configuration.write_text(CONFIGURATION)
        os.environ |= {"CONTAINERS_CONF": str(configuration), "DOCKER_HOST": socket}
        service = subprocess.Popen(
            ["podman", "system", "service", "-t", "0", socket], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            yield
        finally:
            service.terminate()
            service.wait()
            del os.environ["CONTAINERS_CONF"], os.environ["DOCKER_HOST"]


class Stack:
    """One project of Compose."""

    def __init__(self, project: str, *overrides: str, keep: bool = False) -> None:
        """overrides: files beside this one. keep: nothing is taken down at the end."""
        self.project, self._keep = project, keep
        self._variables: dict[str, str] = {}
        self._token = ""
        self._command = [*shlex.split(os.environ.get("COMPOSE", "docker compose")), "-p", project]
        files = [ROOT / "docker-compose.yml", *(Path(__file__).parent / name for name in ("podman.yml", *overrides))]
        self._command += [word for each in files for word in ("-f", str(each))]
        self._over = threading.Event()

    def __enter__(self) -> "Stack":
        threading.Thread(target=self._look_after_health, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if not self._keep:
            self.compose("--profile", "*", "down", "--volumes", "--timeout", "70")

    def up(self, *services: str, **variables: str) -> None:
        """Start these, or all that have no profile; anew when the variables are others than before."""
        again = ["--force-recreate"] if variables != self._variables else []
        self._variables = variables
        self.compose("up", "--no-build", "--detach", *again, *services)

    def compose(self, *words: str) -> str:
        return run(*self._command, *words, timeout=1200, environment=self._variables)

    def containers(self, service: str = "") -> dict[str, dict[str, Any]]:
        """By name: what podman knows of each that belongs to the project, or to one service of it."""
        wanted = [f"--filter=label=com.docker.compose.project={self.project}"]
        wanted += [f"--filter=label=com.docker.compose.service={service}"] if service else []
        names = run("podman", "ps", "--all", "--format", "{{.Names}}", *wanted).split()
        return {each["Name"]: each for each in json.loads(run("podman", "inspect", *names))} if names else {}

    def sapo(self, *words: str, service: str = "control-plane") -> Any:
        """The answer, as JSON, of a `sapo` command in a service's container; its exit status does not count."""
        (name,) = self.containers(service)
        done = subprocess.run(
            ["podman", "exec", name, "sapo", *words, "--json"], capture_output=True, text=True, timeout=120
        )
        try:
            return json.loads(done.stdout)
        except ValueError:
            raise Failed(done.stderr[-500:]) from None

    def status(self) -> dict[str, Any]:
        """What the control plane says, asked from outside: `sapo status` takes seconds of a busy machine."""
        if not self._token:
            (name,) = self.containers("control-plane")
            self._token = run("podman", "exec", name, "cat", "/secrets/sapo_token")
        request = Request("http://127.0.0.1:8080/v1/status", headers={"Authorization": f"Bearer {self._token}"})
        with urlopen(request, timeout=10) as answer:
            return dict(json.load(answer))

    def _look_after_health(self) -> None:
        """Podman leaves to systemd's timers when health is asked for; here nobody else does."""
        while not self._over.wait(3):
            with contextlib.suppress(Failed, subprocess.TimeoutExpired):
                for name, each in self.containers().items():
                    health = each["State"].get("Health") or each["State"].get("Healthcheck") or {}
                    if each["State"]["Running"] and health.get("Status") not in ("healthy", None, ""):
                        subprocess.run(["podman", "healthcheck", "run", name], capture_output=True, timeout=60)


def eventually(what: str, seconds: float, holds: Any) -> float:
    """Waits until holds() gives something true; returns the seconds it took, raises Failed when they are over."""
    started, last = time.monotonic(), ""
    while time.monotonic() - started < seconds:
        try:
            if holds():
                return time.monotonic() - started
        # It is only just starting.
        except (Failed, subprocess.TimeoutExpired, OSError, LookupError, TypeError) as error:
            last = f": {error}"
        time.sleep(1)
    raise Failed(f"{what}: not within {seconds:.0f} s{last}")
