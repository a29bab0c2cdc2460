"""One log event per line on standard error: JSON, or text where somebody watches on a terminal.

Every event says the service and, once it is known, the run. What a piece of work is about (its draw, its trace) is said
once, by `about`, and is a field of every event of that work, also of those that libraries log.
"""

import contextlib
import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TextIO

from pythonjsonlogger.json import JsonFormatter

from sapo_learner.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

FORMATS, LEVELS = ("text", "json"), ("debug", "info", "warning", "error")
OURS = ("services", "sapo_learner")
_FIRST = ("time", "level", "service", "run", "message")  # of an event's fields, for whoever reads the bare lines
_process: dict[str, Any] = {}
_about: ContextVar[Mapping[str, Any]] = ContextVar("about", default=MappingProxyType({}))


class _Patient(io.FileIO):
    """Standard output or error: what a full disk or a closed pipe does not take is given up, and said afterwards."""

    _lost = 0

    def write(self, data: "ReadableBuffer", /) -> int:
        view = memoryview(data).cast("B")
        try:
            if self._lost:
                self._whole(b"\n... %d times there was no room to write here ...\n" % self._lost)
                self._lost = 0
            self._whole(view)
        except OSError:
            self._lost += 1
        return len(view)

    def _whole(self, data: "ReadableBuffer") -> None:
        view = memoryview(data)
        while view:
            view = view[super().write(view) :]


def configure(service: str) -> None:
    """Log to standard error as SAPO_LOG_FORMAT and SAPO_LOG_LEVEL say. No service dies because it cannot be written.

    The level is that of our own events; of what libraries log, nothing below INFO is shown. Raises ConfigError.
    """
    sys.stdout, sys.stderr = _patient(sys.stdout, sys.__stdout__), _patient(sys.stderr, sys.__stderr__)
    level = _chosen("SAPO_LOG_LEVEL", LEVELS, "info").upper()
    form = _chosen("SAPO_LOG_FORMAT", FORMATS, "text" if sys.stderr.isatty() else "json")
    _process.update(service=service)
    handlers = [event_handler(sys.stderr, form)]
    logging.basicConfig(level=max(logging.INFO, getattr(logging, level)), handlers=handlers, force=True)
    for ours in OURS:
        logging.getLogger(ours).setLevel(logging.DEBUG if level == "DEBUG" else logging.NOTSET)
    for noisy in ("httpx", "httpcore", "asyncio", "uvicorn.access", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    adopt_libraries()


def event_handler(stream: TextIO, form: str) -> logging.Handler:
    """Writes events with the fields of the work that they belong to. form: one of FORMATS."""
    handler = logging.StreamHandler(stream)
    handler.addFilter(_with_fields)
    handler.setFormatter(_Json() if form == "json" else _text())
    return handler


def adopt_libraries() -> None:
    """Have libraries that brought a handler of their own for the terminal (transformers, vLLM) log as all others do.

    To be called again when one of them was imported later.
    """
    for logger in list(logging.root.manager.loggerDict.values()):  # others may be made meanwhile
        if isinstance(logger, logging.Logger) and any(type(each) is logging.StreamHandler for each in logger.handlers):
            logger.handlers = [each for each in logger.handlers if type(each) is not logging.StreamHandler]
            logger.propagate = True


def of_run(run: str) -> None:
    """Have every event from here on name the run; "" where it is not known."""
    if run:
        _process.update(run=run)


@contextlib.contextmanager
def about(**fields: Any) -> Iterator[None]:
    """What the block's work is about: fields of every event in it, and in the tasks and threads begun in it."""
    before = _about.set({**_about.get(), **{name: value for name, value in fields.items() if value not in (None, "")}})
    try:
        yield
    finally:
        _about.reset(before)


def as_text(line: str) -> str:
    """A line of a log as a person reads it; one that is no event of ours as it is. An exception makes it several."""
    try:
        event = json.loads(line)
    except ValueError:
        return line
    if not isinstance(event, dict) or not {"time", "level", "service", "message"} <= event.keys():
        return line
    text = "{time} {service} {level} {message}".format(**event)
    text += f"\n{event['exception']}" if "exception" in event else ""
    return text.encode(errors="backslashreplace").decode()  # a lone surrogate can be written nowhere


def _chosen(variable: str, known: tuple[str, ...], default: str) -> str:
    value = os.environ.get(variable, "").lower() or default
    if value not in known:
        raise ConfigError(f"{value!r} is not known", where=f"environment {variable}", fix=f"one of {', '.join(known)}")
    return value


def _with_fields(record: logging.LogRecord) -> bool:
    for name, value in {**_process, **_about.get()}.items():
        if name not in record.__dict__:  # what the event itself says comes first
            setattr(record, name, value)
    return True


def _text() -> logging.Formatter:
    form = "%(asctime)s.%(msecs)03dZ %(service)s %(levelname)s %(message)s"
    formatter = logging.Formatter(form, "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    return formatter


class _Json(JsonFormatter):
    """RFC 3339 in UTC; whatever an event holds comes out in ASCII, in one line."""

    def __init__(self) -> None:
        names = {"levelname": "level", "name": "logger", "exc_info": "exception", "stack_info": "stack"}
        super().__init__(("asctime", "levelname", "message", "name"), rename_fields={**names, "asctime": "time"})

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        return {name: log_data[name] for name in _FIRST if name in log_data} | log_data


def _patient(stream: Any, original: TextIO | None) -> Any:
    """The process' own stream in its patient form; one that somebody has put in its place stays."""
    if original is None or stream is not original:
        return stream
    stream.flush()
    raw = _Patient(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(raw, original.encoding, "backslashreplace", line_buffering=True, write_through=True)
