"""Which worker serves which policy: heard from heartbeats and lease requests, read back from Redis after a restart."""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from services.runstore import Worker

TTL_SECONDS = 10.0  # a worker that is silent for longer counts as gone
REMEMBERED_SECONDS, REMEMBERED = 600.0, 1000  # how long, and how many, people are told of that are gone


@dataclass(frozen=True, slots=True)
class Serving:
    version: int
    step: int
    heard: float  # time.monotonic


class Workers:
    def __init__(self) -> None:
        self._serving: dict[str, Serving] = {}
        self._gone: dict[str, Serving] = {}

    def restore(self, reports: Iterable[Worker]) -> None:
        """Take over what an earlier control plane heard, so that nobody is thought gone for its restart."""
        for each in reports:
            report = json.loads(each.report_json)
            self.hear(each.name, report["version"], report["step"], age_seconds=each.age_seconds)

    def hear(self, name: str, version: int, step: int, *, age_seconds: float = 0.0) -> Serving:
        """Note what a worker serves. Messages may overtake one another, and versions only rise: the highest counts."""
        now = time.monotonic()
        known = self.alive().get(name, Serving(-1, 0, now))
        if known.version > version:
            version, step = known.version, known.step
        self._gone.pop(name, None)
        self._serving[name] = serving = Serving(version, step, now - age_seconds)
        return serving

    def alive(self) -> dict[str, Serving]:
        """Every worker heard of lately, by name."""
        since = time.monotonic() - TTL_SECONDS
        silent = {name: each for name, each in self._serving.items() if each.heard <= since}
        if silent:
            self._serving = {name: each for name, each in self._serving.items() if name not in silent}
            self._gone = dict([*(self._gone | silent).items()][-REMEMBERED:])
        return dict(self._serving)

    def gone(self) -> list[dict[str, Any]]:
        """Who was heard of within REMEMBERED_SECONDS and is not any more."""
        self.alive()
        now = time.monotonic()
        self._gone = {name: each for name, each in self._gone.items() if now - each.heard < REMEMBERED_SECONDS}
        return [
            {"worker": name, "version": each.version, "step": each.step, "age_seconds": now - each.heard}
            for name, each in self._gone.items()
        ]

    def versions(self) -> dict[str, int]:
        return {name: each.version for name, each in self.alive().items()}

    def fair_share(self, groups_per_step: int) -> int:
        """Most draws one request gets, so that no worker takes a whole step's while others idle."""
        return math.ceil(groups_per_step / max(1, len(self.alive())))
