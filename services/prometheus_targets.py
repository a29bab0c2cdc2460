"""Where a Prometheus finds the processes of a `sapo up`: a file for its file_sd_configs, in the run's directory."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)
TARGETS_FILE = "prometheus-targets.json"


def write_targets(directory: Path, run: str, processes: Mapping[str, str]) -> None:
    """processes: name -> HOST:PORT of its /metrics; none: nobody is there any more. Never fails for the disk's sake."""
    targets = [
        {"targets": [address], "labels": {"run": run, "service": _service(name), "process": name}}
        for name, address in processes.items()
    ]
    path = directory / TARGETS_FILE
    try:
        path.with_suffix(".tmp").write_text(json.dumps(targets, indent=2))
        os.replace(path.with_suffix(".tmp"), path)
    except OSError as error:
        log.warning("%s: %s; a Prometheus may look for the processes in the wrong place", path, error)


def _service(name: str) -> str:
    return "rollout" if name.startswith("rollout") else name
