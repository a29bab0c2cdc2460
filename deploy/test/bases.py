"""Images to build on and to run beside ours, made of Debian packages where no registry can be reached."""

import tempfile
from pathlib import Path

from containers import run

PYTHON = "docker.io/library/python:3.11-slim-bookworm"
REDIS, PROMETHEUS = "docker.io/valkey/valkey:8.1", "docker.io/prom/prometheus:v3.5.0"
# As the images of that name have it: who owns the data, who runs, and what is started.
REDIS_FILE = "FROM localhost/sapo-debian\nRUN mkdir /data && chown 999:999 /data\nWORKDIR /data\n"
PROMETHEUS_FILE = (
    "FROM localhost/sapo-debian\nRUN mkdir /prometheus && chown 65534:65534 /prometheus\n"
    'USER 65534\nENTRYPOINT ["/usr/bin/prometheus"]\n'
)


def make_stand_ins() -> list[str]:
    """Under the names that docker-compose.yml asks for; returns what each really is."""
    with tempfile.TemporaryDirectory() as directory:
        _debian("bookworm", ["ca-certificates", "python3", "python3-venv", "python3-pip"], PYTHON, Path(directory))
        _debian("trixie", ["valkey-server", "prometheus"], "localhost/sapo-debian", Path(directory))
        for name, text in ((REDIS, REDIS_FILE), (PROMETHEUS, PROMETHEUS_FILE)):
            (Path(directory) / "Dockerfile").write_text(text)
            run("podman", "build", "--format", "docker", "--isolation", "chroot", "-t", name, directory)
    return [
        f"`{PYTHON}`: Debian bookworm with its python3",
        f"`{REDIS}`: Debian trixie with {_version('valkey-server')}",
        f"`{PROMETHEUS}`: Debian trixie with {_version('prometheus')}",
    ]


def _debian(release: str, packages: list[str], name: str, directory: Path) -> None:
    archive = directory / f"{release}.tar"
    run("mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}", release, archive, timeout=1800)
    run("podman", "import", archive, name)


def _version(package: str) -> str:
    query = ["dpkg-query", "--show", "--showformat", "${Package} ${Version}", package]
    return run("podman", "run", "--rm", "--network", "none", "localhost/sapo-debian", *query).strip()
