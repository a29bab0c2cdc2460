"""Logs of services as tests read them: events, or the text that a person would see."""

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.runtime.logging import OURS, as_text, event_handler


def text_of(output: str) -> str:
    """What a process wrote to standard error, its events as text."""
    return "\n".join(map(as_text, output.split("\n")))


def log_text(path: Path) -> str:
    return text_of(path.read_text(errors="backslashreplace"))


def events(path: Path) -> list[dict[str, Any]]:
    """The lines that are events; others come from what does not log, such as Redis."""
    return [json.loads(line) for line in path.read_text(errors="replace").split("\n") if line.startswith('{"time"')]


@contextlib.contextmanager
def heard() -> Iterator[list[dict[str, Any]]]:
    """What our loggers say in the block, down to DEBUG; filled when it ends."""
    stream, found = io.StringIO(), list[dict[str, Any]]()
    handler, loggers = event_handler(stream, "json"), [logging.getLogger(name) for name in OURS]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.addHandler(handler)
        each.setLevel(logging.DEBUG)
    try:
        yield found
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.removeHandler(handler)
            each.setLevel(level)
        found += map(json.loads, stream.getvalue().splitlines())
