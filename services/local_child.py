"""One process of `sapo up`: how it is started, how often it has died, and its end."""

import asyncio
import logging
import os
import signal
from collections import deque
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)
DEATHS, WITHIN_SECONDS = 3, 60.0
STOP_SECONDS = 20.0


@dataclass
class Child:
    """One service: how it is started, and what became of it."""

    name: str
    command: list[str]
    http: str = ""
    once: list[str] = field(default_factory=list)  # options until they have had their effect
    process: asyncio.subprocess.Process | None = None
    state: str = "starting"
    restarts: int = 0
    within_seconds: float = WITHIN_SECONDS  # DEATHS of them without progress stop the run
    deaths: deque[tuple[float, Any]] = field(default_factory=lambda: deque(maxlen=DEATHS))  # when, progress then

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process and self.process.returncode is None else None

    @property
    def keeps_dying(self) -> bool:
        (first, progress), (last, now) = self.deaths[0], self.deaths[-1]
        return len(self.deaths) == DEATHS and last - first < self.within_seconds and progress == now

    async def terminate(self) -> None:
        """Ask it to stop; after STOP_SECONDS its whole group is killed."""
        process = self.process
        if process is None or process.returncode is not None:
            return
        self.state = "stopping"
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            log.warning("%s did not stop within %.0f s: killed", self.name, STOP_SECONDS)
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        self.state = "stopped"
