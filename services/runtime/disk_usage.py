"""How much of a disk a directory takes, and how much is left."""

import contextlib
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DiskUsage:
    used_bytes: int
    free_bytes: float
    """NaN where the disk does not say."""


def disk_usage(directory: Path) -> DiskUsage:
    """Of all files in there. Reads the directory, not the files; what cannot be read counts for nothing."""
    used, free = 0, math.nan
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):  # deleted in between
                used += os.lstat(os.path.join(parent, name)).st_size
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(directory).free
    return DiskUsage(used, free)
