"""What the processes of `sapo up` write to the terminal: one file each, with one older half behind it.

A process writes to its file directly, so that the words it dies with are there too; hence the file is shortened in
place, by copying and truncating, and may lose a line that is written in between.
"""

import shutil
from io import BufferedWriter
from pathlib import Path

from services.runtime.logging import as_text

LOG_BYTES = 32 << 20  # of a file; its older half stays beside it as NAME.log.1
TAIL_BYTES = 64 << 10


class ProcessLogs:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        return self._directory / f"{name}.log"

    def open(self, name: str) -> BufferedWriter:
        """For a process to append to, whatever becomes of the file's length meanwhile."""
        return self.path(name).open("ab")

    def last_lines(self, name: str, count: int) -> list[str]:
        """As a person reads them, whatever their format in the file."""
        with self.path(name).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        return [text for line in lines[-count:] for text in as_text(line).splitlines()][-count:]

    def shorten(self) -> None:
        """Move logs longer than LOG_BYTES aside. Where the disk has no room for the copy, older lines are lost."""
        for path in self._directory.glob("*.log"):
            if path.stat().st_size > LOG_BYTES:
                older = path.with_suffix(".log.1")
                try:
                    shutil.copyfile(path, older)
                except OSError:
                    older.unlink(missing_ok=True)
                with path.open("ab") as file:
                    file.truncate(0)
