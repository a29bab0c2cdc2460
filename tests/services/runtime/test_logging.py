"""Log events: JSON when nobody watches, text on a terminal, with the fields of the work they belong to."""

import json
import os
import pty
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from services.process_logs import ProcessLogs
from services.runtime.logging import as_text

PROGRAM = """
import asyncio, logging, sys, threading, warnings
from services.runtime.logging import about, adopt_libraries, configure, of_run
configure("rollout-0")
log = logging.getLogger("services.rollout.worker")
{body}
"""


def run(body: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body)], capture_output=True, timeout=60,
        env=without_settings() | environment,
    )  # fmt: skip
    assert not result.stdout
    return result.stderr.decode()


def without_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("SAPO_LOG")}


def events(body: str, **environment: str) -> list[dict[str, Any]]:
    """Every line must be one."""
    return [json.loads(line) for line in run(body, **environment).splitlines()]


def test_an_event_is_one_json_object_with_time_level_service_and_message() -> None:
    before = datetime.now(UTC)
    (event,) = events("log.warning('%d of %s', 3, 'é \\udcff \"x\"\\n\\u2028second line')")
    assert list(event)[:4] == ["time", "level", "service", "message"]
    assert event.pop("message") == '3 of é \udcff "x"\n\u2028second line'
    at = event.pop("time")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", at)
    assert abs((datetime.fromisoformat(at) - before).total_seconds()) < 60
    assert event == {"level": "WARNING", "service": "rollout-0", "logger": "services.rollout.worker"}


def test_the_run_is_named_from_when_it_is_known() -> None:
    before, unknown, after = events("log.info('a'); of_run(''); log.info('b'); of_run('demo-1f'); log.info('c')")
    assert "run" not in before
    assert "run" not in unknown
    assert after["run"] == "demo-1f"


def test_an_exception_is_a_field_and_not_more_lines() -> None:
    body = "try: 1 / 0\nexcept ZeroDivisionError: log.exception('died')"
    (event,) = events(body)
    assert event["message"] == "died"
    assert event["exception"].startswith("Traceback (most recent call last):\n")
    assert event["exception"].endswith("ZeroDivisionError: division by zero")


def test_what_work_is_about_is_a_field_of_every_event_in_it_and_in_what_it_began() -> None:
    body = """
async def work(draw):
    with about(draw=draw, trace_id="t%d" % draw, entry=""):
        await asyncio.sleep(0)  # the other one runs meanwhile
        log.info("own")
        await asyncio.create_task(other())
        await asyncio.to_thread(log.info, "in a thread", extra={"draw": 9})
    log.info("after")

async def other():
    logging.getLogger("a.library").info("of a library")

async def both():
    await asyncio.gather(work(1), work(2))

asyncio.run(both())
"""
    found = events(body)
    by_draw = {
        draw: [each["message"] for each in found if each.get("trace_id") == f"t{draw}" and each["draw"] in (draw, 9)]
        for draw in (1, 2)
    }
    assert by_draw == {1: ["own", "of a library", "in a thread"], 2: ["own", "of a library", "in a thread"]}
    assert [each["draw"] for each in found if each["message"] == "in a thread"] == [9, 9], "what is said itself counts"
    assert all("entry" not in each for each in found), "what is not known is no field"
    assert [each.get("draw") for each in found if each["message"] == "after"] == [None, None]


def test_libraries_with_handlers_of_their_own_and_warnings_go_the_same_way() -> None:
    body = """
library = logging.getLogger("library")
library.addHandler(logging.StreamHandler())
library.propagate = False
adopt_libraries()
library.warning("said by %s", "it")
warnings.warn("old", DeprecationWarning)
warnings.warn("careful")
"""
    library, *warned = events(body)
    assert (library["message"], library["logger"]) == ("said by it", "library")
    assert any("careful" in each["message"] for each in warned)


@pytest.mark.parametrize(
    ("level", "said"),
    [("", ["info", "error"]), ("debug", ["debug", "info", "error"]), ("ERROR", ["error"])],
)
def test_the_level_is_that_of_our_events(level: str, said: list[str]) -> None:
    body = "for each in ('debug', 'info', 'error'): getattr(log, each)(each)"
    found = events(f"{body}\nlogging.getLogger('library').debug('never')", SAPO_LOG_LEVEL=level)
    assert [each["message"] for each in found] == said


def test_text_can_be_asked_for_and_is_what_an_event_reads_as() -> None:
    body = "log.error('x %s', 1)\ntry: 1 / 0\nexcept ZeroDivisionError: log.exception('y')"
    text, read = run(body, SAPO_LOG_FORMAT="text"), "\n".join(map(as_text, run(body).splitlines())) + "\n"
    assert re.match(r"....-..-..T..:..:..\....Z rollout-0 ERROR x 1\n", text)
    assert without_times(read) == without_times(text)


def without_times(text: str) -> str:
    return re.sub(r"^\S+Z ", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize(("variable", "value"), [("SAPO_LOG_FORMAT", "xml"), ("SAPO_LOG_LEVEL", "loud")])
def test_what_is_not_known_is_refused(variable: str, value: str) -> None:
    assert f"environment {variable}: '{value}' is not known (one of " in run("", **{variable: value})


@pytest.mark.parametrize(("form", "begins"), [("", b"20"), ("json", b'{"time"')])
def test_on_a_terminal_it_is_text_unless_json_is_asked_for(form: str, begins: bytes) -> None:
    ours, theirs = pty.openpty()
    try:
        command = [sys.executable, "-c", PROGRAM.format(body="log.info('x')")]
        subprocess.run(command, stderr=theirs, timeout=60, env=without_settings() | {"SAPO_LOG_FORMAT": form})
        assert os.read(ours, 4096).startswith(begins)
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("line", ["", "plain", "{", "[1]", '{"message": "of another program"}', "null"])
def test_a_line_that_is_no_event_of_ours_stays_as_it_is(line: str) -> None:
    assert as_text(line) == line


def test_the_last_lines_of_a_process_are_what_a_person_reads(tmp_path: Path) -> None:
    logs = ProcessLogs(tmp_path)
    body = "log.info('first')\ntry: raise ValueError('\\udcff')\nexcept ValueError: log.exception('died \\udcff')"
    logs.path("learner").write_text(f"# native code speaks\n{run(body)}")
    native, first, died, trace, file, error = logs.last_lines("learner", 20)
    assert native == "# native code speaks"
    assert first.endswith("Z rollout-0 INFO first")
    assert died.endswith(r"Z rollout-0 ERROR died \udcff")
    assert (trace, error) == ("Traceback (most recent call last):", r"ValueError: \udcff")
    assert logs.last_lines("learner", 2) == [file, error]
