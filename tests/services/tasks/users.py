"""Whose processes start a sandbox: those of who runs the tests, or, where that is root, of an ordinary user, too.

Root starts it as nobody, an ordinary user as themselves: not the same calls of the kernel. An ordinary user may read
neither this checkout nor the Python that runs the tests, and gets the system's Python and a copy of the sandbox, which
needs the standard library alone.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sapo_learner.errors import ConfigError
from services.task_parts.sandbox import Limits, Outcome, Sandbox

WHO = ["who runs the tests", "an ordinary user"] if os.getuid() == 0 else ["who runs the tests"]
NUMBER = 65533  # and not nobody's, whom root becomes
PYTHON = Path("/usr/bin/python3")
NEEDED = ("services/task_parts/sandbox", "sapo_learner/errors.py", "services/runtime/processes.py")
CALL = """
import json, sys
from services.task_parts.sandbox import Limits, Sandbox
method, limits, arguments = json.load(sys.stdin)
found = getattr(Sandbox("bubblewrap", Limits(**limits)), method)(*arguments)
print(json.dumps(found if method == "check" else [found.code, found.output.hex()]))
"""
REQUIRE = (
    "from services.task_parts.sandbox import *; Sandbox('bubblewrap', Limits()).require(otherwise='sandbox: none')"
)


@dataclass(frozen=True)
class User:
    """identity: what subprocess has to know. directory: from where `services` can be imported."""

    python: str = sys.executable
    directory: Path = field(default_factory=Path.cwd)
    identity: dict[str, Any] = field(default_factory=dict)

    def sandbox(self, limits: Limits) -> Sandbox:
        return Theirs(self, limits) if self.identity else Sandbox("bubblewrap", limits)

    def process(self, script: str, **options: Any) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, "PYTHONPATH": str(self.directory)}
        return subprocess.Popen(
            [self.python, "-c", script], cwd=self.directory, env=environment, **self.identity, **options
        )


class Theirs(Sandbox):
    """Each call in a process of that user."""

    def __init__(self, user: User, limits: Limits) -> None:
        super().__init__("bubblewrap", limits)
        self._user = user

    def run(self, code: str, stdin: str, seconds: float, output_bytes: int, *, errors: bool = False) -> Outcome:
        code_, output = self._call("run", code, stdin, seconds, output_bytes)
        return Outcome(code_, bytes.fromhex(output))

    def check(self, code: str, setup: str, tests: Sequence[str], seconds: float) -> list[bool]:
        found: list[bool] = self._call("check", code, setup, list(tests), seconds)
        return found

    def _call(self, method: str, *arguments: Any) -> Any:
        given = json.dumps([method, asdict(self._limits), arguments]).encode()
        with self._user.process(CALL, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            return json.loads(process.communicate(given)[0])


@contextmanager
def user(who: str = WHO[0]) -> Iterator[User]:
    """One of `WHO`, for whom the sandbox works; else the test is skipped, or fails in CI."""
    with tempfile.TemporaryDirectory() as directory:  # not pytest's, which every session closes to others
        found = User() if who == WHO[0] else _ordinary(Path(directory))
        _require(found, who)
        yield found


def _require(found: User, who: str) -> None:
    with found.process(REQUIRE, stderr=subprocess.PIPE) as process:
        _, said = process.communicate()
    if process.returncode:
        reason = said.decode().strip().splitlines()[-1]
        if os.environ.get("CI"):
            raise ConfigError(reason, where=f"the sandbox of {who}")
        pytest.skip(f"the sandbox of {who}: {reason}")


def _ordinary(directory: Path) -> User:
    if not PYTHON.exists():
        pytest.skip(f"a Python that everybody may read is needed: {PYTHON}")
    directory.chmod(0o755)
    for name in NEEDED:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if Path(name).is_dir() else shutil.copy)(name, directory / name)
    return User(str(PYTHON), directory, {"user": NUMBER, "group": NUMBER, "extra_groups": []})
