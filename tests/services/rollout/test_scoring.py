"""Scores in processes of their own: whatever a task does costs one response, is counted, and is named."""

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from pebble.common import CONSTS

from sapo_learner.errors import ConfigError
from services.rollout.scoring import ReplyFailed, Scorer
from services.runtime.environment import SECRET
from services.runtime.metrics import RolloutMetrics
from services.runtime.sampling_settings import ScoringSettings
from services.tasks import Prompt, Response, TaskSettings

TASK = """
import itertools, os, re, subprocess, sys, threading, time
import numpy as np
from services.tasks import Prompt, Task


class Unsent(Exception):
    def __init__(self, one, two):
        super().__init__(lambda: one)


class Unsaid(Exception):
    def __str__(self):
        raise ValueError("not even this")


class Name(str):
    pass


def begun():
    open(os.path.join(os.path.dirname(__file__), f"begun-{os.getpid()}"), "w").close()


def starts():
    pids = [subprocess.Popen(["sleep", "1000"]).pid, os.fork() or time.sleep(1000)]
    for pid in pids:
        open(os.path.join(os.path.dirname(__file__), f"started-{pid}"), "w").close()


def dies_later():
    threading.Timer(0.05, os._exit, [3]).start()
    return {"correct": 1.0, "style": 0.5}


KINDS = {
    "right": lambda: {"correct": 1.0, "style": 0.5},
    "true": lambda: {"correct": True, "style": np.float32(0.5)},
    "named": lambda: {Name("correct"): 1, Name("style"): 0.5},
    "dies later": dies_later,
    "raises": lambda: 1 / 0,
    "unsent": lambda: (_ for _ in ()).throw(Unsent(1, 2)),
    "unsaid": lambda: (_ for _ in ()).throw(Unsaid()),
    "leaves": lambda: sys.exit(0),
    "interrupts": lambda: (_ for _ in ()).throw(KeyboardInterrupt),
    "deep": lambda: (lambda f: f(f))(lambda f: f(f)),
    "memory": lambda: {"correct": float(len(bytearray(8 << 30)))},
    "exit 0": lambda: os._exit(0),
    "exit 3": lambda: os._exit(3),
    "segfault": lambda: os.kill(os.getpid(), 11),
    "killed": lambda: os.kill(os.getpid(), 9),
    "starts and crashes": lambda: (starts(), os._exit(3)),
    "starts and hangs": lambda: (starts(), begun(), 0 in itertools.repeat(1)),
    "sleeps": lambda: (begun(), time.sleep(60)),
    "loops": lambda: [None for _ in iter(int, 1)],
    "backtracks": lambda: re.match("(a+)+b", "a" * 60),
    "holds": lambda: (begun(), 0 in itertools.repeat(1)),  # never looks for signals
    "None": lambda: None,
    "text": lambda: "1.0",
    "number": lambda: 1.0,
    "empty": lambda: {},
    "nan": lambda: {"correct": float("nan"), "style": 0.0},
    "inf": lambda: {"correct": float("-inf"), "style": 0.0},
    "array": lambda: {"correct": np.array([1.0, 2.0]), "style": 0.0},
    "list": lambda: {"correct": [1.0], "style": 0.0},
    "unnamed": lambda: {3: 1.0},
    "nothing": lambda: {"correct": None},
    "other names": lambda: {"correct": 1.0, "length": 0.5},
    "token": lambda: {"correct": float("geheim" in os.environ.values()), "style": 0.5},
}


class Odd(Task):
    def prompts(self, split):
        return [Prompt(id="p-17", content="?")]

    def score(self, prompt, response):
        return KINDS[response.text]()

    def reply(self, prompt, turns):
        replies = {"good": Name("well"), "over": None, "empty": "", "number": 3, "half": "\\ud800"}
        return replies.get(turns[-1]) or KINDS[turns[-1]]()
"""
TRUE = {"correct": 1.0, "style": 0.5}
PROMPT = Prompt(id="p-17", content="?")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "odd.py"
    path.write_text(TASK)
    return path


@pytest.fixture
def made(file: Path) -> Callable[..., Scorer]:
    def make(**settings: object) -> Scorer:
        scoring = ScoringSettings.model_validate({"timeout_seconds": 20, **settings})
        return Scorer([TaskSettings(name=str(file))], scoring, RolloutMetrics())

    return make


def answers(*texts: str) -> list[Response]:
    return [Response(text, "stop", (text,)) for text in texts]


def failures(scorer: Scorer) -> dict[str, float]:
    (metric,) = scorer._metrics.scoring_failures.collect()
    return {each.labels["reason"]: each.value for each in metric.samples if each.name.endswith("_total") and each.value}


def begun(directory: Path) -> list[Path]:
    """One file for each process that is at a score without an end."""
    return list(directory.glob("begun-*"))


def started(directory: Path) -> list[psutil.Process]:
    """What scores have started; all of it, once one of them has `begun` or was found to have failed."""
    found = []
    for path in directory.glob("started-*"):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(int(path.name.removeprefix("started-"))))
    return found


def none_left(directory: Path) -> bool:
    """Of two processes that a score has started."""
    assert len(list(directory.glob("started-*"))) == 2
    left = psutil.wait_procs(started(directory), timeout=10)[1]
    for each in left:
        each.kill()
    return not left


def gone(processes: Sequence[psutil.Process]) -> bool:
    return bool(processes) and not psutil.wait_procs(processes, timeout=10)[1]


BEFORE: set[psutil.Process] = set()


@pytest.fixture(autouse=True)
def before() -> None:
    """Whatever other tests have started and not yet ended, such as a Redis."""
    BEFORE.clear()
    BEFORE.update(psutil.Process().children(recursive=True))


def children() -> list[psutil.Process]:
    """Of this process since the test began, those that live, but for the one that tidies up after multiprocessing."""
    living = []
    for each in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if (
                each not in BEFORE
                and each.status() != psutil.STATUS_ZOMBIE
                and "resource_tracker" not in " ".join(each.cmdline())
            ):
                living.append(each)
    return living


EXCEPTIONS = ["raises", "unsent", "unsaid", "leaves", "interrupts", "deep", "memory"]
MALFORMED = ["None", "text", "number", "empty", "nan", "inf", "array", "list", "unnamed", "nothing", "other names"]
CRASHES = ["exit 3", "segfault", "killed"]
TIMEOUTS = ["sleeps", "loops", "backtracks", "holds", "exit 0"]


@pytest.mark.parametrize(
    ("texts", "reason", "seconds"),
    [(EXCEPTIONS, "exception", 20), (MALFORMED, "malformed", 20), (CRASHES, "crash", 20), (TIMEOUTS, "timeout", 1.0)],
    ids=["exception", "malformed", "crash", "timeout"],
)
async def test_a_score_that_fails_is_counted_and_named_and_its_siblings_keep_theirs(
    made: Callable[..., Scorer], caplog: pytest.LogCaptureFixture, texts: list[str], reason: str, seconds: float
) -> None:
    with made(on_error=-1.0, memory_gib=4, timeout_seconds=seconds) as scorer:
        found = await scorer.score("odd", PROMPT, answers("right", *texts, "true", "named"))
        assert found == [TRUE, *[{"correct": -1.0, "style": -1.0}] * len(texts), TRUE, TRUE]
        assert all(type(value) is float and type(name) is str for each in found for name, value in each.items())
        assert failures(scorer) == {reason: len(texts)}
        told = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
        assert len(told) == len(texts)
        assert all("task odd, prompt p-17: " in each and each.endswith("counts as -1") for each in told)
        started = children()
    assert gone(started)


async def test_the_log_says_what_went_wrong_and_where(
    made: Callable[..., Scorer], caplog: pytest.LogCaptureFixture
) -> None:
    with made() as scorer:
        await scorer.score("odd", PROMPT, answers("raises", "exit 3", "nan"))
    told = " ".join(each.getMessage() for each in caplog.records)
    assert "ZeroDivisionError: division by zero" in told
    assert "odd.py, line " in told
    assert "its process ended: exit code 3" in told
    assert "reward 'correct' is nan, not a finite number" in told


async def test_a_group_without_any_score_is_worth_on_error_in_the_components_known_by_then(
    made: Callable[..., Scorer],
) -> None:
    with made(on_error=0.25) as scorer:
        assert await scorer.score("odd", PROMPT, answers("raises", "raises")) == [{"correct": 0.25}] * 2
        assert await scorer.score("odd", PROMPT, answers("right")) == [TRUE]
        assert await scorer.score("odd", PROMPT, answers("raises")) == [dict.fromkeys(TRUE, 0.25)]


async def test_a_response_that_failed_already_is_worth_on_error(made: Callable[..., Scorer]) -> None:
    with made(on_error=-1.0) as scorer:
        found = await scorer.score("odd", PROMPT, [*answers("right"), None])
        assert found == [TRUE, dict.fromkeys(TRUE, -1.0)]
        assert failures(scorer) == {}, "it was counted when it failed"


@pytest.mark.parametrize("text", ["raises", "exit 3", "nan", "leaves"])
async def test_on_error_stop_ends_the_worker_with_the_reason(made: Callable[..., Scorer], text: str) -> None:
    with made(on_error="stop") as scorer:
        with pytest.raises(ConfigError, match=r"task odd, prompt p-17: .*scoring\.on_error"):
            await scorer.score("odd", PROMPT, answers("right", text))
        assert sum(failures(scorer).values()) == 1


async def test_a_process_that_dies_after_its_score_costs_nothing(made: Callable[..., Scorer]) -> None:
    with made(processes=1) as scorer:
        assert await scorer.score("odd", PROMPT, answers("dies later")) == [TRUE]
        while children():
            await asyncio.sleep(0.01)
        assert await scorer.score("odd", PROMPT, answers("right", "right")) == [TRUE, TRUE]
        assert failures(scorer) == {}


async def test_processes_that_never_get_to_a_score_stop_the_worker(made: Callable[..., Scorer], file: Path) -> None:
    with made(processes=1) as scorer:
        file.write_text("import os\nos._exit(4)\n")
        with pytest.raises(ConfigError, match="ended 3 times before they could score"):
            await scorer.score("odd", PROMPT, answers("right"))


async def test_scores_of_a_lost_lease_free_their_processes(
    made: Callable[..., Scorer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONSTS, "term_timeout", 1000)  # nothing is to wait for the signal that comes after SIGTERM
    with made(processes=2, timeout_seconds=100) as scorer:
        await scorer.score("odd", PROMPT, answers("right"))
        lost = asyncio.create_task(scorer.score("odd", PROMPT, answers(*["holds"] * 20)))
        while len(begun(tmp_path)) < 2:
            await asyncio.sleep(0.01)
        lost.cancel()
        async with asyncio.timeout(60):  # not 20 times anything
            assert await scorer.score("odd", PROMPT, answers("right", "right")) == [TRUE, TRUE]
        assert failures(scorer) == {}


@pytest.mark.parametrize("text", ["sleeps", "holds"])
async def test_leaving_while_a_score_runs_leaves_no_process(
    made: Callable[..., Scorer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(CONSTS, "term_timeout", 1000)
    with made(timeout_seconds=100) as scorer:
        running = asyncio.create_task(scorer.score("odd", PROMPT, answers(text, text)))
        while len(begun(tmp_path)) < 2:
            await asyncio.sleep(0.01)
        started = children()
    running.cancel()
    assert gone(started)


@pytest.mark.parametrize(("text", "reason"), [("starts and hangs", "timeout"), ("starts and crashes", "crash")])
async def test_what_a_failed_score_has_started_ends_with_its_process(
    made: Callable[..., Scorer], tmp_path: Path, text: str, reason: str
) -> None:
    with made(processes=1, timeout_seconds=3) as scorer:
        assert await scorer.score("odd", PROMPT, answers("right", text)) == [TRUE, dict.fromkeys(TRUE, 0.0)]
        assert failures(scorer) == {reason: 1}
        assert none_left(tmp_path)
        assert await scorer.score("odd", PROMPT, answers("right")) == [TRUE]


async def test_what_a_score_has_started_ends_with_the_scorer(made: Callable[..., Scorer], tmp_path: Path) -> None:
    with made(timeout_seconds=100) as scorer:
        running = asyncio.create_task(scorer.score("odd", PROMPT, answers("starts and hangs")))
        while not begun(tmp_path):
            await asyncio.sleep(0.01)
        assert len(started(tmp_path)) == 2
    running.cancel()
    assert none_left(tmp_path)


async def test_what_only_the_worker_needs_is_not_in_the_environment(
    made: Callable[..., Scorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {"SAPO_TOKEN", "SAPO_REDIS_URL", "SAPO_TOKEN_FILE", "SAPO_TLS_KEY"} <= set(SECRET)
    for name in SECRET:
        monkeypatch.setenv(name, "geheim")
    with made() as scorer:
        assert await scorer.score("odd", PROMPT, answers("token")) == [{"correct": 0.0, "style": 0.5}]


async def test_replies_are_texts_or_the_end_and_one_that_fails_ends_the_response(
    made: Callable[..., Scorer], caplog: pytest.LogCaptureFixture
) -> None:
    with made() as scorer:
        assert await scorer.reply("odd", PROMPT, ["good"]) == "well"
        assert type(await scorer.reply("odd", PROMPT, ["good"])) is str
        assert await scorer.reply("odd", PROMPT, ["None"]) is None
        assert failures(scorer) == {}
        for count, turn in enumerate(["raises", "exit 3", "number", "leaves", "half"], start=1):
            with pytest.raises(ReplyFailed):
                await scorer.reply("odd", PROMPT, [turn])
            assert sum(failures(scorer).values()) == count
        assert failures(scorer) == {"exception": 2, "crash": 1, "malformed": 2}


def test_no_process_before_the_first_score(made: Callable[..., Scorer]) -> None:
    before = len(children())
    with made():
        assert len(children()) == before


@pytest.mark.parametrize("text", ["sleeps", "holds", "starts and hangs"])
def test_kill_9_of_the_worker_leaves_no_process(file: Path, tmp_path: Path, text: str) -> None:
    script = tmp_path / "worker.py"
    script.write_text(f"""
import asyncio
from services.rollout.scoring import Scorer
from services.runtime.metrics import RolloutMetrics
from services.runtime.sampling_settings import ScoringSettings
from services.tasks import Prompt, Response, TaskSettings


async def main():
    with Scorer([TaskSettings(name={str(file)!r})], ScoringSettings(timeout_seconds=100), RolloutMetrics()) as scorer:
        prompt = Prompt(id="p", content="?")
        await scorer.score("odd", prompt, [Response("right", "stop")])
        print("ready", flush=True)
        await scorer.score("odd", prompt, [Response({text!r}, "stop")] * 3)


if __name__ == "__main__":
    asyncio.run(main())
""")
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
        while len(begun(tmp_path)) < 2:
            time.sleep(0.01)
        found = psutil.Process(worker.pid).children(recursive=True)
        worker.kill()
    assert gone(found)
