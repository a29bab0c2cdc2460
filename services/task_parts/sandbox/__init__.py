"""Runs code that nobody has read, such as a policy's, where it can harm nothing: Python under bubblewrap (`bwrap`).

It has namespaces of its own, so there is no network, no other process and no run directory; it sees /usr and Python's
own directory, read-only, an empty directory of limited size, and no environment. Memory, processor time, processes,
file sizes and what it prints are bounded, and whatever it started ends with it, also when the caller is killed.

What it does not bound: shared memory of System V, the kernel's own memory, and memory of all processes together below
`processes` times `memory_mib`. A machine that must stand even that gives the worker a cgroup with a memory limit.
"""

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

from sapo_learner.errors import ConfigError
from services.runtime.processes import die_with_parent, end_group_with_me

Isolation = Literal["bubblewrap", "none"]
NOBODY = 65534
READY_SECONDS = 20.0
POLL_SECONDS = 0.1
SHORT_SECONDS = 0.005  # between the end of the output and that of the process
_INSIDE = (Path(__file__).parent / "inside.py").read_text()  # what runs there


@dataclass(frozen=True)
class Limits:
    """memory_mib: address space of each process. disk_mib: of all files, and of each. processes: threads included."""

    memory_mib: int = 512
    disk_mib: int = 64
    processes: int = 16
    cpu_seconds: int = 10


@dataclass(frozen=True)
class Outcome:
    """How a program ended. code: None when it was killed because it ran too long or printed too much."""

    code: int | None
    output: bytes
    errors: str = ""


class Sandbox:
    def __init__(self, isolation: Isolation, limits: Limits) -> None:
        """isolation: "none" runs everything with the rights of the caller, only with limits on time and memory."""
        self._isolation, self._limits = isolation, limits

    def require(self, *, otherwise: str) -> None:
        """Raises ConfigError when it does not work on this machine; otherwise: the setting that goes without."""
        if self._isolation == "none":
            return
        if not sys.platform.startswith("linux") or shutil.which("bwrap") is None:
            raise ConfigError(
                "bubblewrap is not installed", where="sandbox",
                fix=f"apt-get install bubblewrap; or write {otherwise}, which runs responses with your own rights",
            )  # fmt: skip
        _interpreter()
        outcome = self.run("print('ready')", "", READY_SECONDS, 100, errors=True)
        if outcome.output != b"ready\n":
            reason = " ".join(outcome.errors.split())[:300] or f"exit code {outcome.code}"
            raise ConfigError(
                f"bubblewrap does not work here: {reason}", where="sandbox",
                fix="it needs version 0.8 and user namespaces, which containers often forbid: allow them (docker: "
                "--security-opt seccomp=unconfined, --security-opt systempaths=unconfined), run the worker outside, or "
                f"write {otherwise} to run responses with your own rights",
            )  # fmt: skip

    def run(self, code: str, stdin: str, seconds: float, output_bytes: int, *, errors: bool = False) -> Outcome:
        """Run a program of its own. errors: keep what it says on stderr, unbounded; for our own programs alone."""
        with tempfile.TemporaryFile() if errors else open(os.devnull, "r+b") as said:
            with _file(code) as program, _file(stdin) as given:
                fd = program.fileno()
                with self._started(["program", str(fd)], [fd], given.fileno(), said.fileno()) as process:
                    output = _read(process, time.monotonic() + seconds, output_bytes)
            said.seek(0)
            text = said.read().decode(errors="replace") if errors else ""
        return Outcome(None, b"", text) if output is None else Outcome(process.returncode, output, text)

    def check(self, code: str, setup: str, tests: Sequence[str], seconds: float) -> list[bool]:
        """Whether each test, a piece of Python after `setup`, passes with the functions and classes of `code`.

        Code and tests run in two sandboxes that exchange plain values: the code under test sees its arguments, never a
        test, and cannot touch what decides. See `services.task_parts.sandbox.inside` for which values travel.
        """
        questions = json.dumps({"setup": setup, "tests": list(tests)})
        to_code, from_tests = os.pipe()
        to_tests, from_code = os.pipe()
        fds = {to_code, from_tests, to_tests, from_code}
        nothing = subprocess.DEVNULL
        try:
            with _file(code) as program, _file(questions) as asked:
                answer = ["answer", *map(str, (program.fileno(), to_code, from_code))]
                ask = ["ask", *map(str, (asked.fileno(), to_tests, from_tests))]
                with (
                    self._started(answer, [program.fileno(), to_code, from_code], nothing, nothing),
                    self._started(ask, [asked.fileno(), to_tests, from_tests], nothing, nothing) as process,
                ):
                    for fd in list(fds):
                        os.close(fd)
                        fds.remove(fd)
                    verdict = _verdict(process, time.monotonic() + seconds, len(tests))
        finally:
            for fd in fds:
                os.close(fd)
        return [each == ord("1") for each in verdict.ljust(len(tests), b"0")]

    @contextmanager
    def _started(
        self, arguments: list[str], fds: list[int], stdin: int, stderr: int
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A process inside; leaving the block ends it and all that it started."""
        directories = tempfile.TemporaryDirectory() if self._isolation == "none" else _no_directory()
        with directories as directory, _lifeline() as alive:
            process = subprocess.Popen(
                [*self._wrapper(), *self._python(), str(alive), *arguments], stdin=stdin, stdout=subprocess.PIPE,
                stderr=stderr, pass_fds=[alive, *fds], env={"PYTHONHASHSEED": "0"}, cwd=directory,
                start_new_session=True, preexec_fn=self._first,
                **_unprivileged() if self._isolation == "bubblewrap" else {},
            )  # fmt: skip
            with process:
                try:
                    yield process
                finally:
                    os.killpg(process.pid, signal.SIGKILL)  # not reaped so far, or its number could be another's

    def _first(self) -> None:
        """In the new process, before anything else runs there."""
        if bind := die_with_parent(signal.SIGKILL):  # bwrap asks for the same, but only once it runs
            bind()
        if self._isolation == "none":  # else it ends with its namespace
            end_group_with_me()

    def _python(self) -> list[str]:
        limits = {
            "RLIMIT_AS": self._limits.memory_mib << 20,
            "RLIMIT_CPU": self._limits.cpu_seconds,
            "RLIMIT_FSIZE": self._limits.disk_mib << 20,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
            "RLIMIT_MSGQUEUE": 0,
        }
        if self._isolation == "bubblewrap":  # elsewhere the user's other processes would count
            limits["RLIMIT_NPROC"] = self._limits.processes
        python = _interpreter() if self._isolation == "bubblewrap" else sys.executable
        return [python, "-s", "-B", "-c", _INSIDE, json.dumps(limits)]

    def _wrapper(self) -> list[str]:
        if self._isolation == "none":
            return []
        prefix = Path(_interpreter()).parent.parent
        own = [] if prefix.is_relative_to("/usr") else ["--ro-bind", str(prefix), str(prefix)]
        return [
            shutil.which("bwrap") or "bwrap",
            # disable-userns: whoever is root in a namespace of its own may mount memory without a limit
            "--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL", "--hostname", "sandbox",
            "--die-with-parent", "--new-session", "--clearenv", "--setenv", "PYTHONHASHSEED", "0",
            "--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", *own,
            "--proc", "/proc", "--dev", "/dev", "--size", str(self._limits.disk_mib << 20), "--tmpfs", "/work",
            "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/work", "--",
        ]  # fmt: skip


@contextmanager
def _no_directory() -> Iterator[str]:
    yield "/"


@contextmanager
def _lifeline() -> Iterator[int]:
    """The end of a pipe whose other end this process alone holds: it says whether that lives.

    Until bwrap has made its namespaces, the first process in them does not end with the one outside. So what runs there
    looks once more: whoever has died by then is seen to, and who dies later is bwrap's business.
    """
    reader, writer = os.pipe()
    try:
        yield reader
    finally:
        os.close(reader)
        os.close(writer)


@contextmanager
def _file(text: str) -> Iterator[IO[bytes]]:
    """A file without a name, open at its beginning."""
    with tempfile.TemporaryFile() as file:
        file.write(text.encode(errors="replace"))
        file.seek(0)
        yield file


def _unprivileged() -> dict[str, Any]:
    """Root inside a namespace is root to the kernel's limit on processes, so that root becomes nobody first."""
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}


@cache
def _interpreter() -> str:
    """The Python that this one was made of, without its environment; when nobody may read it, that of the system."""
    own = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [own, Path("/usr/bin/python3")]
    for each in candidates:
        if each.is_file() and (os.getuid() != 0 or _open_to_all(each)):
            return str(each)
    raise ConfigError(
        f"as root, responses run as user {NOBODY}, who may read none of {', '.join(map(str, candidates))}",
        where="sandbox", fix="install a Python that everybody may read (apt-get install python3), or do not be root",
    )  # fmt: skip


def _open_to_all(path: Path) -> bool:
    return all(each.stat().st_mode & 0o005 == 0o005 for each in (path.resolve(), *path.resolve().parents))


def _chunks(process: subprocess.Popen[bytes], deadline: float) -> Iterator[bytes]:
    """What it prints, as it comes, until it has ended; raises TimeoutError when it has not by then."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.get_map() or not _ended(process):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            ended = _ended(process)  # what it has started may hold the pipe open longer
            if selector.select(0 if ended else min(left, POLL_SECONDS if selector.get_map() else SHORT_SECONDS)):
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if chunk:
                    yield chunk
                else:
                    selector.unregister(process.stdout)
            elif ended:
                return


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Without reaping it."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _read(process: subprocess.Popen[bytes], deadline: float, limit: int) -> bytes | None:
    """All that it prints, once it has ended; None when that is too long, or takes too long."""
    output = bytearray()
    try:
        for chunk in _chunks(process, deadline):
            output += chunk
            if len(output) > limit:
                return None
    except TimeoutError:
        return None
    return bytes(output)


def _verdict(process: subprocess.Popen[bytes], deadline: float, count: int) -> bytes:
    """One character per test, as far as it has come by then."""
    verdict = b""
    try:
        for chunk in _chunks(process, deadline):
            verdict += chunk
            if len(verdict) >= count:
                break
    except TimeoutError:
        pass
    return verdict[:count]
