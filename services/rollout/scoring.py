"""Rewards of responses, computed within a deadline in processes of their own.

A score that raises, takes too long, crashes its process or is no mapping of names to finite numbers is a fault of the
reward, not of the response: it is counted, named in the log with its prompt, and scored as `scoring.on_error` says.
"""

import asyncio
import ctypes
import itertools
import logging
import multiprocessing
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import pebble

from sapo_learner.errors import ConfigError, SapoError
from services.runtime.environment import SECRET
from services.runtime.metric_definitions import FAILED
from services.runtime.metrics import RolloutMetrics
from services.runtime.processes import end_group_with_me, exit_reason
from services.runtime.sampling_settings import ScoringSettings
from services.tasks import Prompt, Response, Task, TaskSettings, build_all

log = logging.getLogger(__name__)
Rewards = dict[str, float]
CHARACTERS = 300  # of what an exception says
MESSAGE_CHARACTERS = 1000
TRIES = 3  # pools, for a score that none of them gets to


class _Failed(Exception):
    """kind: a label of the metric; the rest is for people."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


class ReplyFailed(Exception):
    """The task was to reply, and could not."""


class Scorer:
    """Scores and replies of the run's tasks. Use as a context manager: leaving it ends the processes."""

    def __init__(
        self,
        settings: Sequence[TaskSettings],
        scoring: ScoringSettings,
        metrics: RolloutMetrics,
    ) -> None:
        """Raises ConfigError for what a task cannot do without on this machine."""
        self.tasks, self._scoring, self._metrics = build_all(settings), scoring, metrics
        for task in self.tasks.values():
            task.ready()
        for label, kind in itertools.product(self.tasks, FAILED):
            metrics.scoring_failures.labels(label, kind)  # there from the start
        self._worth = 0.0 if scoring.on_error == "stop" else scoring.on_error
        self._settings = list(settings)
        self.failures = Counter[str]()  # responses that could not be scored or replied to, by reason
        self.last_failure = ""
        self._names: dict[str, list[str]] = {}  # components of a task, by label, as its last group had them
        self._pool = None if all(task.inline for task in self.tasks.values()) else self._new_pool()
        # A score that a process has been handed cannot be taken back, only ended with the process.
        self._room = asyncio.Semaphore(scoring.processes)

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self._pool:
            _end(self._pool)

    def _new_pool(self) -> pebble.ProcessPool:
        """Its processes start with the first score."""
        given = (self._settings, self._scoring.memory_gib, os.getpid())
        return pebble.ProcessPool(
            self._scoring.processes, initializer=_prepare, initargs=given,
            context=multiprocessing.get_context("spawn"),  # threads and engines do not survive a fork
        )  # fmt: skip

    async def score(self, label: str, prompt: Prompt, responses: Sequence[Response | None]) -> list[Rewards]:
        """The reward components of each response, the same names for all of them; None: of one that has failed already.

        Raises ConfigError where `scoring.on_error` is stop.
        """
        found = await asyncio.gather(*(self._one(label, prompt, each) for each in responses))
        names = next((list(each) for each in found if each is not None), None)
        if names is None:
            names = self._names.get(label, ["correct"])
        else:
            self._names[label] = names
        return [self._complete(label, prompt, each, names) for each in found]

    async def reply(self, label: str, prompt: Prompt, turns: Sequence[str]) -> str | None:
        """What the task says after these turns; None when the response is over. Raises ReplyFailed, counted and logged,
        where the task could not say; the response is worth `scoring.on_error` then."""
        if type(self.tasks[label]).reply is Task.reply:
            return None
        try:
            found = await self._run(label, _reply, _inline_reply, prompt, list(turns))
        except _Failed as error:
            self._note(label, prompt, error)
            raise ReplyFailed from None
        return found if isinstance(found, str) else None

    async def _one(self, label: str, prompt: Prompt, response: Response | None) -> Rewards | None:
        if response is None:
            return None
        found = await self._guarded(label, prompt, lambda: self._run(label, _score, _inline_score, prompt, response))
        return found if isinstance(found, dict) else None

    def _complete(self, label: str, prompt: Prompt, rewards: Rewards | None, names: list[str]) -> Rewards:
        """`rewards`; where the score failed, or has other components than its siblings', what that is worth in each."""
        if rewards is not None and rewards.keys() != set(names):
            what = f"score returned the components {sorted(rewards)}, for another response {sorted(names)}"
            self._note(label, prompt, _Failed("malformed", what))
            rewards = None
        return dict.fromkeys(names, self._worth) if rewards is None else rewards

    async def _guarded(self, label: str, prompt: Prompt, work: Callable[[], Any]) -> Any:
        """What `work` gives; None, counted and logged, where it fails."""
        try:
            return await work()
        except _Failed as error:
            self._note(label, prompt, error)
            return None

    def _note(self, label: str, prompt: Prompt, error: _Failed) -> None:
        """Count it and say it; raises ConfigError where it shall end the worker."""
        self._metrics.scoring_failures.labels(label, error.kind).inc()
        self.failures[error.kind] += 1
        what = f"task {label}, prompt {prompt.id}: {error}".encode(errors="replace").decode()
        self.last_failure = what[:MESSAGE_CHARACTERS]  # half a surrogate pair can neither be sent nor written
        if self._scoring.on_error == "stop":
            raise ConfigError(
                str(error), where=f"task {label}, prompt {prompt.id}",
                fix="mend the task, or set scoring.on_error to what such a response is worth",
            ) from None  # fmt: skip
        log.warning("%s; counts as %g", what, self._worth)

    async def _run(self, label: str, remote: Callable[..., Any], inline: Callable[..., Any], *args: Any) -> Any:
        task = self.tasks[label]
        if task.inline:
            return _checked(await asyncio.to_thread(inline, task, *args))
        try:
            async with self._room:
                return _checked(await self._answer(remote, (label, *args)))
        except TimeoutError:
            seconds = self._scoring.timeout_seconds
            raise _Failed("timeout", f"no answer within scoring.timeout_seconds ({seconds:g})") from None
        except pebble.ProcessExpired as error:
            raise _Failed("crash", f"its process ended: {exit_reason(error.exitcode or 0, meaning=True)}") from None

    async def _answer(self, remote: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """What a process returns. A pool one of whose processes dies while idle is broken, and replaced."""
        for _ in range(TRIES):
            pool = self._pool
            assert pool is not None
            try:
                return await asyncio.wrap_future(
                    pool.schedule(remote, args=args, timeout=self._scoring.timeout_seconds)
                )
            except RuntimeError as error:
                log.warning("scoring: %s; its processes start again", error)
                if self._pool is pool:
                    self._pool = self._new_pool()
                    await asyncio.to_thread(_end, pool)
        raise ConfigError(
            f"its processes ended {TRIES} times before they could score", where="scoring",
            fix="the log says why; perhaps scoring.memory_gib is too little for the task",
        )  # fmt: skip


def _end(pool: pebble.ProcessPool) -> None:
    pool.stop()  # type: ignore[no-untyped-call]
    pool.join()


def _checked(outcome: tuple[str, Any]) -> Any:
    kind, value = outcome
    if kind != "ok":
        raise _Failed(kind, value)
    return value


# ---- in the processes

_tasks: dict[str, Task] = {}


def _prepare(settings: list[TaskSettings], memory_gib: float | None, parent: int) -> None:
    """Build the tasks, give up what a task has no business with, and end with the worker, however that ends."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: also out of a loop that holds the interpreter
        if os.getppid() != parent:
            os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler in Python waits for whoever holds the interpreter
    os.setsid()
    end_group_with_me()  # what a score has started and not waited for
    for name in SECRET:
        os.environ.pop(name, None)
    if memory_gib:
        size = int(memory_gib * (1 << 30))
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    _tasks.update(build_all(settings))


def _score(label: str, prompt: Prompt, response: Response) -> tuple[str, Any]:
    return _inline_score(_tasks[label], prompt, response)


def _reply(label: str, prompt: Prompt, turns: list[str]) -> tuple[str, Any]:
    return _inline_reply(_tasks[label], prompt, turns)


def _inline_score(task: Task, prompt: Prompt, response: Response) -> tuple[str, Any]:
    return _caught(lambda: _rewards(task.score(prompt, response)))


def _inline_reply(task: Task, prompt: Prompt, turns: list[str]) -> tuple[str, Any]:
    return _caught(lambda: _text(task.reply(prompt, turns)))


def _caught(work: Callable[[], Any]) -> tuple[str, Any]:
    """("ok", value), or what went wrong as text: an exception of somebody's task may not be one that can be sent."""
    try:
        return "ok", work()
    except _Failed as error:
        return error.kind, str(error)
    except BaseException as error:  # somebody else's code, which may raise anything, SystemExit and its like included
        return "exception", _said(error)


def _said(error: BaseException) -> str:
    try:
        what = str(error) if isinstance(error, SapoError) else f"{type(error).__name__}: {error}"
    except Exception:  # somebody else's, too
        what = type(error).__name__
    frames = []
    traceback = error.__traceback__
    while traceback:
        frames.append(f"{traceback.tb_frame.f_code.co_filename}, line {traceback.tb_lineno}")
        traceback = traceback.tb_next
    return f"{' '.join(what.split())[:CHARACTERS]} ({frames[-1]})"


def _rewards(found: Any) -> Rewards:
    if not isinstance(found, Mapping) or not found:
        raise _Failed("malformed", f"score returned {found!r:.100}, not named rewards such as {{'correct': 1.0}}")
    rewards = {}
    for name, value in found.items():
        if isinstance(value, np.generic):
            value = value.item()
        if not isinstance(name, str) or not isinstance(value, int | float) or not np.isfinite(value):
            raise _Failed("malformed", f"reward {name!r} is {value!r:.100}, not a finite number")
        rewards[str.__str__(name)] = float(value)  # plain ones: others may not arrive
    return rewards


def _text(found: Any) -> str | None:
    if found is not None and (not isinstance(found, str) or not found):
        raise _Failed("malformed", f"reply returned {found!r:.100}, not a text or None")
    if found is not None and any("\ud800" <= each <= "\udfff" for each in found):
        raise _Failed("malformed", f"reply returned {found!r:.100}, which holds half a character (a lone surrogate)")
    return None if found is None else str.__str__(found)
