"""TensorBoard event files in RUN/tensorboard: `tensorboard --logdir runs`.

Written by TensorBoard's own parts that frame and describe events. Its SummaryWriter is torch's, which the control plane
starts without; its EventFileWriter has a second thread, in which a full disk would be found out too late.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from services.record_writers import Line, RecordWriter, Run, figures

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

_numbers = itertools.count()  # so that no two files of this process have one name


class TensorBoard(RecordWriter):
    """Steps, and beside them what belongs to none of their branches: an evaluation is not repeated with its step."""

    module = "tensorboard"

    def __init__(self, run: Run) -> None:
        directory = run.directory / "tensorboard"
        self._steps, self._others = _EventFiles(directory / "steps"), _EventFiles(directory / "others")
        self._step: int | None = None  # the last one that was written, by this writer

    def write(self, line: Line) -> None:
        values = figures(line)
        if not values:
            return
        at, step = float(line["time"]), int(line["step"])
        if line["kind"] != "step":
            self._others.add(at, step, values)
            return
        if self._step is None or step <= self._step:
            self._steps.go_back(at, step)
        self._steps.add(at, step, values)
        self._step = step

    def close(self) -> None:
        self._steps.close()
        self._others.close()


class _EventFiles:
    """One directory. A file that could not be written is left as it is, for it may end in half an event."""

    def __init__(self, directory: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter as Framing

        self._directory, self._framing, self._events, self._summaries = directory, Framing, event_pb2, summary_pb2
        self._file: Framing | None = None

    def add(self, at: float, step: int, values: Mapping[str, float]) -> None:
        """Raises OSError."""
        summary = self._summaries.Summary(
            value=[self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        )
        self._write(self._events.Event(wall_time=at, step=step, summary=summary))

    def go_back(self, at: float, step: int) -> None:
        """What was written of this step and later ones, by whomever, no longer counts."""
        session = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(self._events.Event(wall_time=at, step=step, session_log=session))

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _write(self, event: "Event") -> None:
        try:
            if self._file is None:
                self._open(event.wall_time)
            assert self._file is not None
            self._file.write(event.SerializeToString())
            self._file.flush()
        except OSError:
            file, self._file = self._file, None
            if file:
                with contextlib.suppress(OSError):
                    file.close()
            raise

    def _open(self, at: float) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.sapo.{os.getpid()}.{next(_numbers):06d}"
        self._file = self._framing((self._directory / name).open("xb"))
        version = self._events.Event(wall_time=at, file_version="brain.Event:2")
        self._file.write(version.SerializeToString())
