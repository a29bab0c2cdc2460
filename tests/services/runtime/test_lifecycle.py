"""A process ends when it is asked to, whatever it is doing, and says with its exit code what went wrong."""

import signal
import subprocess
import sys
import time

import pytest

from tests.logs import text_of

PROGRAM = """
import asyncio, sys, time
from sapo_learner.errors import ConfigError
from services.runtime import lifecycle
from services.runtime.logging import configure

async def serve(life):
    {body}

configure("test")
sys.exit(lifecycle.run(serve))
"""


def run(body: str, *, send: int | None = None, timeout: float = 30) -> tuple[int, str, float]:
    """Exit code, standard error, and seconds from the signal (sent once "up" is printed) to the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    if send is not None:
        assert process.stdout.readline() == "up\n"
        process.send_signal(send)
    started = time.monotonic()
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, text_of(errors), time.monotonic() - started


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_that_still_starts_ends_at_once(number: int) -> None:
    """It waits for a peer that never answers; nothing is to be drained."""
    code, errors, _ = run("print('up', flush=True); await asyncio.sleep(600)", send=number)
    assert code == 0
    assert "Traceback" not in errors


def test_a_start_that_blocks_in_a_thread_ends_soon() -> None:
    code, errors, seconds = run(
        "print('up', flush=True); await asyncio.to_thread(time.sleep, 600)", send=signal.SIGTERM
    )
    assert code == 1
    assert "still not stopped after 3 s" in errors
    assert seconds < 20


def test_a_ready_service_drains_before_it_ends() -> None:
    body = (
        "life.ready(); print('up', flush=True); await life.stopping.wait(); await asyncio.sleep(0.1); "
        "print('drained', file=sys.stderr)"
    )
    code, errors, _ = run(body, send=signal.SIGTERM)
    assert code == 0
    assert "drained" in errors


def test_an_error_of_ours_is_one_line_and_its_exit_code_also_from_a_background_task() -> None:
    body = """
    async def fail():
        raise ConfigError("port in use", where="127.0.0.1:80", fix="choose another")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(fail())
        await life.stopping.wait()
    """
    code, errors, _ = run(body)
    assert code == 2
    assert "ERROR 127.0.0.1:80: port in use (choose another)" in errors
    assert "Traceback" not in errors


def test_a_bug_is_a_traceback_and_exit_code_1() -> None:
    code, errors, _ = run("1 / 0")
    assert code == 1
    assert "ZeroDivisionError" in errors
