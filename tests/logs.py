"""Logs of services as tests read them: events, or the text that a person would see."""

import json
from pathlib import Path
from typing import Any

from services.runtime.logging import as_text


def text_of(output: str) -> str:
    """What a process wrote to standard error, its events as text."""
    return "\n".join(map(as_text, output.split("\n")))


def log_text(path: Path) -> str:
    return text_of(path.read_text(errors="backslashreplace"))


def events(path: Path) -> list[dict[str, Any]]:
    """The lines that are events; others come from what does not log, such as Redis."""
    return [json.loads(line) for line in path.read_text(errors="replace").split("\n") if line.startswith('{"time"')]
