"""Looks at an engine's health: how fast it samples, and whether it still does."""

import time
from collections.abc import Callable

from sapo_learner.errors import Unavailable
from services.rollout.engines import EngineHealth

WINDOW_SECONDS = 0.5  # shorter windows say nothing about a rate
STALL_SECONDS = 300.0  # longer than an engine's first compilation, shorter than anybody's patience


class EngineWatch:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counted_at, self._counted, self._rate = clock(), 0, 0.0
        self._moved_at, self._seen = clock(), 0

    def look(self, health: EngineHealth) -> float:
        """Tokens per second lately. Raises Unavailable for an engine that is dead, or has work and samples nothing."""
        if not health.alive:
            raise Unavailable(f"the inference engine died: {health.detail}", where="rollout worker")
        now = self._clock()
        if health.tokens != self._seen or not health.rows:
            self._moved_at, self._seen = now, health.tokens
        elif now - self._moved_at > STALL_SECONDS:
            raise Unavailable(
                f"the inference engine sampled nothing for {now - self._moved_at:.0f} s with {health.rows} rows to do",
                where="rollout worker",
            )
        if now - self._counted_at >= WINDOW_SECONDS:
            self._rate = (health.tokens - self._counted) / (now - self._counted_at)
            self._counted_at, self._counted = now, health.tokens
        return self._rate
