"""Groups as they were trained, token by token: `groups/ENTRY.json` in the run's directory, the newest of them.

For a person who looks; nothing here reads them. So a disk that takes nothing costs the files, not the run.
"""

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from sapo_learner.errors import ConfigError, NotFound
from services.runtime.api import ENTRY, MAX_ENTRY, ShownGroup

log = logging.getLogger(__name__)
KEPT, KEPT_BYTES = 200, 64 << 20


class KeptGroups:
    def __init__(self, directory: Path, kept: int = KEPT, kept_bytes: int = KEPT_BYTES) -> None:
        self._directory, self._kept, self._kept_bytes = directory, kept, kept_bytes
        self._full = False  # the disk, and that it has been said
        self._rows: dict[str, tuple[int, dict[str, Any]]] = {}  # entry -> bytes of its file, its row; oldest first
        self.revision = 0
        """Rises with every group."""
        self._read_back()

    def keep(self, group: ShownGroup) -> None:
        """Never fails for the disk's sake."""
        content = to_json(group.model_dump(), inf_nan_mode="null")
        path = self._path(group.entry)
        temporary = path.with_suffix(".tmp")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except OSError as error:
            if not self._full:
                log.error("%s: %s; groups are not kept for the dashboard until there is room", path, error)
            self._full = True
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            return
        self._full = False
        self._rows.pop(group.entry, None)
        self._rows[group.entry] = (len(content), row(group))
        self.revision += 1
        self._prune()

    def rows(self) -> list[dict[str, Any]]:
        """What a list shows of each, the newest first."""
        return [each for _, each in reversed(self._rows.values())]

    def file(self, entry: str) -> Path:
        """Raises ConfigError for what is no entry, NotFound."""
        path = self._path(entry)
        if not path.is_file():
            fix = f"only the newest {self._kept} are; `sapo show RUN {entry}` looks into the archive"
            raise NotFound(f"group {entry} is not kept", where="groups", fix=fix)
        return path

    def _path(self, entry: str) -> Path:
        if not re.fullmatch(ENTRY, entry) or len(entry) > MAX_ENTRY:
            raise ConfigError(f"{entry[:80]!r} is no entry", where="groups", fix="GENERATION-SEQUENCE, as in 1-57")
        return self._directory / f"{entry}.json"

    def _prune(self) -> None:
        while self._rows and (len(self._rows) > self._kept or self._bytes > self._kept_bytes):
            oldest = next(iter(self._rows))
            del self._rows[oldest]
            with contextlib.suppress(OSError):
                self._path(oldest).unlink(missing_ok=True)

    @property
    def _bytes(self) -> int:
        return sum(size for size, _ in self._rows.values())

    def _read_back(self) -> None:
        """What an earlier control plane has kept; a file that cannot be read is left out."""
        found = [path for path in self._directory.glob("*.json") if re.fullmatch(ENTRY, path.stem)]
        for path in sorted(found, key=lambda path: [int(part) for part in path.stem.split("-")]):
            try:
                content = path.read_bytes()
                self._rows[path.stem] = (len(content), row(ShownGroup.model_validate_json(content)))
            except (OSError, ValueError) as error:
                log.warning("%s: %s; left out of the dashboard", path, error)
        self._prune()


def row(group: ShownGroup) -> dict[str, Any]:
    """What a list shows of a group. weight_mean: over the tokens that have a weight; None without one."""
    weights = [weight for each in group.responses for weight in each.tokens.gate_weight if weight is not None]
    return {
        "entry": group.entry, "step": group.step, "draw": group.draw, "task": group.task, "worker": group.worker,
        "rewards": [each.reward for each in group.responses], "weight": group.weight,
        "weight_mean": sum(weights) / len(weights) if weights else None,
        "tokens": sum(len(each.tokens.id) for each in group.responses),
        "prompt": (group.prompt.text or "")[:80],
    }  # fmt: skip
