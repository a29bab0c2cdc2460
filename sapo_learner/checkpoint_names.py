"""Which checkpoints a directory holds, by their names and sizes alone."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

FACTS = "checkpoint.json"
NAME = re.compile(r"step-(\d{8,})-(\d{8,})")


@dataclass(frozen=True, slots=True)
class Found:
    step: int
    token: int
    path: Path


def list_whole(directory: Path) -> list[Found]:
    """Checkpoints whose files are all there with the right sizes, newest first. Digests are checked on loading."""
    return [found for found in named(directory) if sizes_fit(found.path)]


def named(directory: Path) -> list[Found]:
    """Every directory with a checkpoint's name, newest first."""
    matches = [(path, NAME.fullmatch(path.name)) for path in directory.glob("step-*") if path.is_dir()]
    return sorted((Found(int(m[1]), int(m[2]), path) for path, m in matches if m), key=age, reverse=True)


def age(found: Found) -> tuple[int, int]:
    """Rises with time; see the module's docstring for why the token comes first."""
    return found.token, found.step


def sizes_fit(path: Path) -> bool:
    """The cheap half of `verified`."""
    try:
        files = json.loads((path / FACTS).read_bytes())["files"]
        return all((path / name).stat().st_size == blob["size"] for name, blob in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
