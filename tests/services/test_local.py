"""`sapo up` as a supervisor: restarts what dies, gives up when that does not help, leaves nothing behind."""

import asyncio
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sapo_learner.config import parse
from sapo_learner.errors import ConfigError, SapoError, Unavailable
from services import local
from services.local import LocalRun
from services.local_child import Child
from services.rollout.engines import vllm_adapter
from services.run_directory import live_services, set_aside
from services.runstore import EmbeddedRedis
from services.runtime.environment import OF_A_DEPLOYMENT
from services.runtime.settings import RunConfig

FOREVER = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(0)); time.sleep(600)"


def supervised(directory: Path, **programs: str) -> LocalRun:
    """A LocalRun whose children are small Python programs instead of services."""
    config = parse(RunConfig, {"run": {"name": "test", "dir": str(directory)}}, where="test")
    run = LocalRun(config, workers=1)
    run.children = {name: Child(name, [sys.executable, "-c", program]) for name, program in programs.items()}
    return run


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[..., LocalRun]]:
    runs: list[LocalRun] = []

    def make(**programs: str) -> LocalRun:
        runs.append(supervised(tmp_path / "run", **programs))
        return runs[-1]

    yield make
    for run in runs:
        await run.stop()


def answering(status: dict[str, Any]) -> Callable[[], Awaitable[dict[str, Any]]]:
    async def answer() -> dict[str, Any]:
        return status

    return answer


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_killed_process_is_restarted(start: Callable[..., LocalRun]) -> None:
    run = start(ingest=FOREVER)
    await run.start()
    child = run.children["ingest"]
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: child.restarts == 1 and child.pid not in (None, first))
    services = live_services(run.directory)
    assert services is not None
    await until(lambda: (live_services(run.directory) or services).processes["ingest"]["pid"] == child.pid)


async def test_three_deaths_without_progress_stop_the_run_with_its_last_words(start: Callable[..., LocalRun]) -> None:
    run = start(ingest="print('the disk is on fire', flush=True); exit(1)")
    await run.start()
    with pytest.raises(SapoError, match="the disk is on fire"):
        await asyncio.wait_for(run.finished(asyncio.Event(), lambda _: None), 20)
    assert run.children["ingest"].restarts == 2


async def test_deaths_between_which_the_run_makes_progress_do_not_count(start: Callable[..., LocalRun]) -> None:
    run = start(ingest="exit(1)")
    steps = iter(range(1000))
    run._progress = lambda: (next(steps), 0)  # type: ignore[method-assign]
    await run.start()
    await until(lambda: run.children["ingest"].restarts >= 4)
    assert not run._failure.done()


async def test_a_configuration_error_stops_the_run_at_once(start: Callable[..., LocalRun]) -> None:
    run = start(learner="import sys; print('no config.json there', flush=True); sys.exit(2)")
    await run.start()
    with pytest.raises(SapoError, match=r"no config\.json there"):
        await asyncio.wait_for(run.finished(asyncio.Event(), lambda _: None), 20)
    assert run.children["learner"].restarts == 0


async def test_a_learner_that_exits_0_after_its_last_step_has_done_its_work(start: Callable[..., LocalRun]) -> None:
    run = start(learner="exit(0)")
    run.control.status = answering({"learner": {"step": 5}, "steps": 5})  # type: ignore[method-assign]
    await run.start()
    await until(lambda: run.children["learner"].state == "done")
    assert run.children["learner"].restarts == 0


async def test_a_learner_that_somebody_stopped_before_its_last_step_is_restarted(
    start: Callable[..., LocalRun],
) -> None:
    run = start(learner="exit(0)")
    run.control.status = answering({"learner": {"step": 4}, "steps": 5})  # type: ignore[method-assign]
    await run.start()
    await until(lambda: run.children["learner"].restarts >= 1)


async def test_a_view_that_cannot_be_drawn_does_not_end_the_run(start: Callable[..., LocalRun]) -> None:
    run = start(ingest=FOREVER)
    stop, drawn = asyncio.Event(), []

    def draw(_: LocalRun) -> None:
        drawn.append(1)
        if len(drawn) == 2:
            stop.set()
        raise TypeError("unsupported format string passed to NoneType")

    await run.start()
    assert not await asyncio.wait_for(run.finished(stop, draw), 20)


async def test_stop_ends_every_process_in_order(start: Callable[..., LocalRun], tmp_path: Path) -> None:
    said = tmp_path / "said"
    program = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        f"    open({str(said)!r}, 'a').write('NAME '); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"open({str(tmp_path)!r} + '/NAME.up', 'w')\n"
        "time.sleep(600)"
    )
    names = ["control-plane", "ingest", "learner", "rollout-0"]
    run = start(**{name: program.replace("NAME", name) for name in names})
    await run.start()
    await until(lambda: len(list(tmp_path.glob("*.up"))) == len(names))
    pids = [child.pid for child in run.children.values()]
    await run.stop()
    assert said.read_text().split() == ["rollout-0", "learner", "ingest", "control-plane"]
    assert not any(psutil.pid_exists(pid) for pid in pids if pid)
    assert live_services(run.directory) is None


async def test_children_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
from pathlib import Path
from tests.services.test_local import FOREVER, supervised
async def main():
    run = supervised(Path({str(tmp_path / "run")!r}), ingest=FOREVER)
    await run.start()
    print(run.children["ingest"].pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    child = psutil.Process(int(await asyncio.wait_for(parent.stdout.readline(), 20)))
    parent.kill()
    await parent.wait()
    await until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


async def test_a_directory_has_one_supervisor(start: Callable[..., LocalRun], tmp_path: Path) -> None:
    run = start(ingest=FOREVER)
    await run.start()
    with pytest.raises(Unavailable, match="another `sapo up`"):
        supervised(tmp_path / "run")


def test_set_aside_takes_the_first_free_name(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "demo").mkdir()
        (tmp_path / "demo" / "file").touch()
        assert set_aside(tmp_path / "demo") == tmp_path / f"demo.{number}"
    assert not (tmp_path / "demo").exists()


def test_secrets_of_a_run_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    from services.run_directory import LocalServices

    LocalServices(1, 0.0, "http://x", "x:1", "redis://:secret@x", "token", {}).write(tmp_path)
    assert (tmp_path / "services.json").stat().st_mode & 0o077 == 0


async def test_the_reason_of_a_server_on_a_full_disk_is_in_the_message_that_ends_the_run(
    start: Callable[..., LocalRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start()
    server = EmbeddedRedis(tmp_path / "redis")
    full = f"(trap '' XFSZ; ulimit -f 0; exec {shlex.join(server.command())}) | cat; exit 1"  # its log has room
    run.children = {"server": Child("server", ["/bin/sh", "-c", full])}
    monkeypatch.setattr(local, "LITTLE_BYTES", 1 << 62)
    await run.start()
    with pytest.raises(SapoError, match=r"(?s)server died.*append only file on disk: File too large.*make room"):
        await asyncio.wait_for(run.finished(asyncio.Event(), lambda _: None), 20)


async def test_a_process_that_somebody_else_killed_may_have_found_no_memory(
    start: Callable[..., LocalRun], caplog: pytest.LogCaptureFixture
) -> None:
    run = start(ingest="import os; os.kill(os.getpid(), 9)")
    await run.start()
    with pytest.raises(
        SapoError, match=r"ingest died \(SIGKILL, by the kernel because memory ran out, or by somebody\)"
    ):
        await asyncio.wait_for(run.finished(asyncio.Event(), lambda _: None), 20)
    assert "or by somebody); restarting" in caplog.text


async def test_an_engine_that_is_not_installed_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_adapter, "_installed", lambda _: None)
    given = {"run": {"name": "test", "dir": str(tmp_path / "run")}, "engine": {"name": "vllm"}}
    with pytest.raises(ConfigError, match="vLLM is not installed here"):
        LocalRun(parse(RunConfig, given, where="test"), workers=1)
    assert not (tmp_path / "run").exists()


async def test_workers_that_take_long_to_start_may_take_longer_to_die_three_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_adapter, "_installed", lambda _: "0.32.0")
    given = {"run": {"name": "test", "dir": str(tmp_path / "run")}, "engine": {"name": "vllm"}}
    run = LocalRun(parse(RunConfig, given, where="test"), workers=1)
    try:
        for name, gives_up in (("rollout-0", True), ("ingest", False)):
            run.children[name].deaths.extend([(0.0, (5, 9)), (80.0, (5, 9)), (160.0, (5, 9))])
            assert run.children[name].keeps_dying == gives_up
    finally:
        await run.stop()


async def test_each_process_sees_its_own_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    given = {
        "run": {"name": "test", "dir": str(tmp_path / "run")},
        "parallel": {"processes": 4},
        "local": {"rollout_workers": 2, "learner_gpus": [0, 1, 2, 3], "rollout_gpus": [4, 5, 7, 6]},
    }
    run = LocalRun(parse(RunConfig, given, where="test"), workers=2)
    say = "import os; open(__file__ + '.' + {name!r}, 'w').write(os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))"
    script = tmp_path / "say.py"
    for child in run.children.values():
        if child.name != "redis":
            source = f"import time\n{say.format(name=child.name)}\ntime.sleep(600)".replace(
                "__file__", repr(str(script))
            )
            child.command = [sys.executable, "-c", source]
    try:
        await run.start()
        names = [name for name in run.children if name != "redis"]
        await until(
            lambda: all(Path(f"{script}.{name}").is_file() and Path(f"{script}.{name}").read_text() for name in names)
        )
        seen = {name: Path(f"{script}.{name}").read_text() for name in names}
    finally:
        await run.stop()
    assert seen == {
        "control-plane": "all", "ingest": "all", "learner": "0,1,2,3", "rollout-0": "4,5", "rollout-1": "7,6",
    }  # fmt: skip


async def test_the_locks_of_a_deployment_are_not_those_of_a_run_on_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in OF_A_DEPLOYMENT:
        monkeypatch.setenv(name, "/etc/sapo/file")
    run = LocalRun(parse(RunConfig, {"run": {"name": "test", "dir": str(tmp_path)}}, where="test"), workers=1)
    try:
        given = run._environment("ingest")
    finally:
        await run.stop()
    assert not set(OF_A_DEPLOYMENT) & set(given)
    assert (given["SAPO_TOKEN"], given["HOME"]) == (run._token, os.environ["HOME"])


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"rollout_gpus": [6, 7, 8]}, "3 GPUs cannot be shared evenly by 2 workers"),
        ({"rollout_gpus": [6, 6]}, r"local.rollout_gpus names a GPU twice: \[6, 6\]"),
        ({"learner_gpus": [0, 1]}, "local.learner_gpus names 2 GPUs, parallel.processes is 1: one for each"),
    ],
)
def test_gpus_that_cannot_be_shared_out_are_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse(RunConfig, {"local": given}, where="test")
