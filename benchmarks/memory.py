"""Resident memory of this process, of Linux's /proc, in bytes."""

from pathlib import Path


def forget_peak() -> int:
    """Reset the peak of the resident size; returns the size now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
