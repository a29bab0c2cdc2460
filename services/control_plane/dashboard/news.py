"""The broadcaster's messages: the moment, and what of the history is new since the last one."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic_core import to_json

from services.control_plane.dashboard.groups import KeptGroups
from services.control_plane.dashboard.history import History

Look = Callable[[], Awaitable[dict[str, Any]]]
CACHED_SECONDS = 0.5


class News:
    def __init__(self, history: History, groups: KeptGroups, look: Look) -> None:
        self._history, self._groups, self._look = history, groups, look
        self._sent_steps, self._sent_points, self._sent = -1, 0, (-1, -1, -1)
        self._everything, self._made = b"", -CACHED_SECONDS

    def begin(self) -> None:
        """A page has just loaded, or is about to load, all that there is until now."""
        self._sent_steps, self._sent_points = self._history.steps.revision, len(self._history.steps)

    async def message(self) -> bytes:
        history, steps = self._history, self._history.steps
        content: dict[str, Any] = {"now": await self._look()}
        if steps.revision != self._sent_steps:
            content["steps"] = steps.since(max(0, self._sent_points - 1))  # the last may have grown
            self._sent_steps, self._sent_points = steps.revision, len(steps)
        newest = (history.evaluated, (history.histograms or {}).get("step", -1), self._groups.revision)
        for name, before, now in zip(("evaluations", "histograms", "groups"), self._sent, newest, strict=True):
            if before != now:
                content[name] = self._part(name)
        self._sent = newest
        return _json(content)

    def everything(self) -> bytes:
        """The whole history, made at most twice a second, however many ask."""
        now = time.monotonic()
        if now - self._made >= CACHED_SECONDS:
            self._everything = _json(self._history.everything() | {"groups": self._groups.rows()})
            self._made = now
        return self._everything

    def _part(self, name: str) -> Any:
        match name:
            case "evaluations":
                return self._history.evaluation_columns()
            case "histograms":
                return self._history.histograms
            case _:
                return self._groups.rows()


def _json(content: Any) -> bytes:
    return to_json(content, inf_nan_mode="null")
