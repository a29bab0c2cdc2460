"""The files that processes write to stay short, and end with the processes' last words."""

from pathlib import Path

import pytest

from services import process_logs
from services.process_logs import ProcessLogs
from tests.full_disk import no_file_beyond


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProcessLogs:
    monkeypatch.setattr(process_logs, "LOG_BYTES", 100)
    return ProcessLogs(tmp_path / "logs")


def test_a_long_log_is_moved_aside_while_its_process_goes_on_writing(logs: ProcessLogs) -> None:
    with logs.open("learner") as output:
        output.write(b"old\n" * 30)
        output.flush()
        logs.shorten()
        output.write(b"new\n")
        output.flush()
        assert logs.path("learner").read_bytes() == b"new\n"
        assert logs.path("learner").with_suffix(".log.1").read_bytes() == b"old\n" * 30


def test_logs_do_not_grow_with_the_run(logs: ProcessLogs) -> None:
    with logs.open("learner") as output:
        for _ in range(100):
            output.write(b"x" * 50)
            output.flush()
            logs.shorten()
    assert sum(path.stat().st_size for path in logs.path("learner").parent.iterdir()) <= 2 * 150


def test_a_short_log_is_left_alone(logs: ProcessLogs) -> None:
    with logs.open("ingest") as output:
        output.write(b"short\n")
    logs.shorten()
    assert [path.name for path in logs.path("ingest").parent.iterdir()] == ["ingest.log"]


def test_a_full_disk_costs_the_older_lines_and_nothing_else(logs: ProcessLogs) -> None:
    with logs.open("learner") as output:
        output.write(b"x" * 200)
        output.flush()
        with no_file_beyond(50):
            logs.shorten()
            output.write(b"new\n")
            output.flush()
    assert logs.path("learner").read_bytes() == b"new\n"
    assert not logs.path("learner").with_suffix(".log.1").exists()


def test_last_lines_of_a_log_longer_than_is_read(logs: ProcessLogs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_logs, "TAIL_BYTES", 20)
    with logs.open("learner") as output:
        output.write("".join(f"line {index}\n" for index in range(50)).encode())
    assert logs.last_lines("learner", 2) == ["line 48", "line 49"]
