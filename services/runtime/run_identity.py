"""What tells a run from every other: two may have one name, but they do not have one directory."""

import os
import secrets
from pathlib import Path


def identity(directory: Path) -> str:
    """Made when it is first asked for."""
    path = directory / "run.id"
    if not path.exists():
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(secrets.token_hex(8))
        os.replace(temporary, path)
    return path.read_text()
