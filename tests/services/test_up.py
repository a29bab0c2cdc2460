"""Before anything starts: what is wrong is said at once, and an earlier run in the same directory is treated right."""

import asyncio
import io
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from sapo_learner import checkpoint
from sapo_learner.config import parse
from sapo_learner.errors import ConfigError, NotFound, SapoError
from sapo_learner.ledger import Ledger, LedgerReport
from sapo_learner.policy import load_policy, tiny_policy, write_policy
from sapo_learner.snapshot import weights_digest
from services import terminal
from services import up as up_module
from services.health import processes
from services.run_directory import LocalServices, live_services, stopped_status
from services.runtime.http import probe_app, serving
from services.runtime.lifecycle import Lifecycle
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.settings import RunConfig, dump_config
from services.status_report import print_status
from services.view import Pace, View, _line, _panel


def config(directory: Path, **sections: Any) -> RunConfig:
    run = {"name": "test", "dir": str(directory), **sections.pop("run", {})}
    return parse(RunConfig, {"run": run, **sections}, where="test")


def earlier_run(directory: Path, *, steps: int = 0, summary: bool = False, **sections: Any) -> None:
    directory.mkdir()
    (directory / "run.yaml").write_text(dump_config(config(directory, **sections)))
    lines = [{"kind": "step", "time": 1.0, "step": step} for step in range(1, steps + 1)]
    (directory / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if summary:
        (directory / "summary.json").write_text(json.dumps({"steps": steps}))


async def make_way(now: RunConfig, *, again: bool = False) -> str:
    output = io.StringIO()
    await up_module._make_way(now, now.run.directory, Console(file=output, width=200), again=again)
    return output.getvalue()


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"policy": {"source": "/nowhere"}}, r"policy\.source /nowhere: no such directory"),
        ({"task": {"name": "jsonl", "path": "/nowhere.jsonl"}}, "not readable"),
        ({"task": {"name": "jsonll"}}, "did you mean 'jsonl'"),
        ({"objective": {"name": "sapo", "tau": 1}}, "tau_pos"),
    ],
)
async def test_what_can_be_known_beforehand_is_said_before_anything_starts(
    tmp_path: Path, sections: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        await up_module.up(config(tmp_path / "run", **sections), Console(file=io.StringIO()), again=False)
    assert not (tmp_path / "run").exists()


async def test_an_unfinished_run_goes_on_and_lists_what_may_change(tmp_path: Path) -> None:
    earlier_run(tmp_path / "run", steps=3)
    said = await make_way(config(tmp_path / "run", optimizer={"learning_rate": 2e-6}))
    assert "going on" in said
    assert "changed from here on: optimizer.learning_rate: 1e-06 -> 2e-06" in said


async def test_what_would_make_it_another_run_is_refused_with_the_list(tmp_path: Path) -> None:
    earlier_run(tmp_path / "run", steps=3)
    changed = config(tmp_path / "run", sampling={"group_size": 4}, training={"groups_per_step": 7})
    with pytest.raises(ConfigError, match=r"sampling\.group_size: 8 -> 4; training\.groups_per_step: 32 -> 7"):
        await make_way(changed)
    assert (tmp_path / "run" / "run.yaml").exists()
    await make_way(changed, again=True)
    assert (tmp_path / "run.1" / "run.yaml").exists()


async def test_again_sets_aside_only_what_is_complete_or_another_run(tmp_path: Path) -> None:
    earlier_run(tmp_path / "run", steps=3)
    assert "going on" in await make_way(config(tmp_path / "run"), again=True)
    assert not (tmp_path / "run.1").exists()
    (tmp_path / "run" / "summary.json").write_text('{"steps": 100}')
    assert "is now in" in await make_way(config(tmp_path / "run"), again=True)
    assert not (tmp_path / "run").exists()
    earlier_run(tmp_path / "run", steps=3)
    assert f"is now in {tmp_path / 'run.2'}" in await make_way(config(tmp_path / "run", run={"seed": 9}), again=True)


async def test_a_summary_that_cannot_be_read_does_not_stand_in_the_way(tmp_path: Path) -> None:
    earlier_run(tmp_path / "run", steps=3)
    (tmp_path / "run" / "summary.json").write_text("{")
    assert "going on" in await make_way(config(tmp_path / "run"))


async def test_a_run_that_never_began_does_not_stand_in_the_way(tmp_path: Path) -> None:
    earlier_run(tmp_path / "run", policy={"source": "/a/typing/mistake"})
    await make_way(config(tmp_path / "run"))
    assert (tmp_path / "run.1" / "run.yaml").exists()


async def test_a_complete_run_needs_again_or_more_steps(tmp_path: Path) -> None:
    earlier_run(tmp_path / "run", steps=100, summary=True)
    with pytest.raises(ConfigError, match="this run is complete"):
        await make_way(config(tmp_path / "run"))
    assert "training.steps: 100 -> 120" in await make_way(config(tmp_path / "run", training={"steps": 120}))


@pytest.mark.parametrize("again", [False, True])
async def test_a_running_run_is_left_alone(tmp_path: Path, again: bool) -> None:
    earlier_run(tmp_path / "run", steps=3)
    process = psutil.Process()
    LocalServices(process.pid, process.create_time(), "http://x", "x:1", "", "t", {}).write(tmp_path / "run")
    with pytest.raises(SapoError, match="another `sapo up` runs"):
        await make_way(config(tmp_path / "run"), again=again)
    assert (tmp_path / "run" / "run.yaml").exists()


def test_a_process_id_that_came_round_again_is_not_the_run(tmp_path: Path) -> None:
    LocalServices(1, 12345.0, "http://x", "x:1", "", "t", {}).write(tmp_path)
    assert live_services(tmp_path) is None


def test_the_status_of_a_stopped_run_comes_from_its_record(tmp_path: Path) -> None:
    earlier_run(tmp_path / "run", steps=3)
    status = stopped_status(tmp_path / "run")
    assert (status["state"], status["step"], status["steps"]) == ("stopped", 3, 100)
    output = io.StringIO()
    print_status(Console(file=output), status)
    assert "stopped, step 3/100" in output.getvalue()


class Run:
    """What the view reads of a LocalRun."""

    dashboard = "http://127.0.0.1:1/#token=t"

    def __init__(self, directory: Path, status: dict[str, Any]) -> None:
        self.config, self.status, self.children = config(directory), status, dict[str, Any]()


def status(**fields: Any) -> dict[str, Any]:
    step = {
        "reward": 0.5, "entropy": 0.1, "log_ratio_std": 0.1, "policy_age_mean": 1.0, "policy_age_max": 2, "tokens": 9,
    }  # fmt: skip
    evaluations = [{"pass_at_1": index / 20, "standard_error": 0.01, "step": index} for index in range(12)]
    return {
        "run": "test", "state": "training", "steps": 100, "learner": {"step": 12, "waiting_for": ""}, "last_step": step,
        "evaluations": evaluations, "evaluating": [], "workers": [], "version": 12, "groups_ready": 0, "open_leases": 0,
        **fields,
    }  # fmt: skip


def test_the_view_keeps_its_height_and_the_first_evaluation(tmp_path: Path) -> None:
    heights = set()
    for shown in ({}, status(), status(last_step=None, evaluations=[], version=None)):
        output = io.StringIO()
        Console(file=output, width=120).print(_panel(Run(tmp_path, shown), Pace()))  # type: ignore[arg-type]
        heights.add(output.getvalue().count("\n"))
    assert len(heights) == 1
    line = _line(Run(tmp_path, status()), Pace())  # type: ignore[arg-type]
    assert "step 12/100" in line
    assert "held-out pass@1 0.550 (step 11)" in line


def test_the_view_says_when_a_step_had_no_signal(tmp_path: Path) -> None:
    silent = status(last_step=status()["last_step"] | {"tokens": 0})
    assert "no signal" in _line(Run(tmp_path, silent), Pace())  # type: ignore[arg-type]


def drawn(console: Console, run: Run, times: int = 1) -> None:
    with View(console) as draw:
        for _ in range(times):
            draw(run)  # type: ignore[arg-type]


def test_without_a_terminal_a_narrow_console_gets_whole_plain_lines_and_each_note_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    output = io.StringIO()
    monkeypatch.setattr("sys.stdout", output)
    notes = ["no response to the first 32 prompts is correct; for example '[/b]1+1=' was answered '[red]'"]
    workers = [
        {"worker": f"rollout-{index}", "version": 1, "rows": 3, "tokens_per_second": 5.0, "waiting_for": "",
         "notes": notes} for index in range(2)
    ]  # fmt: skip
    drawn(terminal.console(), Run(tmp_path, status(workers=workers)), times=3)
    dashboard, note, line = output.getvalue().splitlines()
    assert dashboard == "dashboard: http://127.0.0.1:1/#token=t"
    assert note == f"note: {notes[0]}"
    assert line.startswith("step 12/100 | eta - | reward 0.50 | policy age 1.0 | held-out pass@1 0.550 (step 11)")
    assert line.endswith("version 12 | 10 tokens/s")


def test_on_a_terminal_the_note_stays_above_the_view(tmp_path: Path) -> None:
    output = io.StringIO()
    workers = [{"worker": "w", "version": 1, "rows": 3, "tokens_per_second": 5.0, "waiting_for": "", "notes": ["odd"]}]
    drawn(Console(file=output, force_terminal=True, width=120), Run(tmp_path, status(workers=workers)))
    assert "note: odd\n" in output.getvalue()
    assert "\x1b[" in output.getvalue()


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    output = io.StringIO()
    drawn(Console(file=output, force_terminal=True, width=120), Run(tmp_path, status()))
    assert "\nstep 12/100" in output.getvalue()
    assert "\x1b[" not in output.getvalue()


def test_figures_that_are_not_known_are_dashes(tmp_path: Path) -> None:
    step = status()["last_step"]
    for shown in (step | {"tokens": 0, "policy_age_mean": 0.0}, step | {"policy_age_mean": None}):
        line = _line(Run(tmp_path, status(last_step=shown)), Pace())  # type: ignore[arg-type]
        assert "policy age -" in line
        assert "- tokens/s" in line  # no worker is heard of
    assert "reward -" in _line(Run(tmp_path, status(last_step=step | {"reward": None})), Pace())  # type: ignore[arg-type]


async def test_status_tells_of_processes_whether_they_run_and_what_they_wait_for(tmp_path: Path) -> None:
    process = psutil.Process()
    lifecycle = Lifecycle()
    lifecycle.wait_for("redis", "Redis")
    async with serving(probe_app(lifecycle, ControlPlaneMetrics().registry), "127.0.0.1:0") as url:
        known = {
            "control-plane": {"pid": process.pid, "http": url.removeprefix("http://")},
            "redis": {"pid": process.pid, "http": ""},
            "learner": {"pid": None, "http": "127.0.0.1:1"},
        }
        found = await processes(LocalServices(process.pid, process.create_time(), url, "x:1", "", "t", known))
    output = io.StringIO()
    print_status(Console(file=output, width=30), status(since=0, accepted=3, processes=found))
    lines = output.getvalue().splitlines()
    (control_plane,) = (line for line in lines if line.startswith("control-plane: "))
    assert re.match(rf"control-plane: process {process.pid} since \d+-\d+-\d+ [\d:]+, waits for .*Redis", control_plane)
    assert "learner: does not run" in lines
    assert not any("redis" in line and "waits" in line for line in lines)


def test_status_before_the_first_policy_says_that_there_is_none() -> None:
    output = io.StringIO()
    print_status(Console(file=output), status(version=None, since=0, accepted=0))
    assert "no policy published yet" in output.getvalue()
    assert "None" not in output.getvalue()


# ---- --from


ALPHABET = "0123456789+-=()>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_policy(tiny_policy(ALPHABET, seed=0), directory)
    return directory


def finished_run(directory: Path, model: Path) -> dict[int, str]:
    """A run with two checkpoints of different weights; returns the digest of each step's."""
    earlier_run(directory, steps=4)
    shutil.copytree(model, directory / "model")
    digests = {}
    for step in (2, 4):
        tensors = tiny_policy(ALPHABET, seed=step).tensors()
        state = checkpoint.CheckpointState(step, step, "", {}, dict(tensors), {}, {})
        checkpoint.save(directory / "checkpoints", state, token=1)
        digests[step] = weights_digest(tensors)
    return digests


async def test_from_a_run_a_step_or_a_model_keeps_a_copy_named_by_its_weights(tmp_path: Path, model: Path) -> None:
    digests = finished_run(tmp_path / "old", model)
    expected = {
        str(model): weights_digest(load_policy(model).tensors()),
        f"{tmp_path}/old": digests[4],
        f"{tmp_path}/old@2": digests[2],
    }
    assert len(set(expected.values())) == 3
    for name, digest in expected.items():
        changed = await up_module._begin_with(name, config(tmp_path / "new"), again=False)
        source = Path(changed.policy.source)
        assert source == (tmp_path / f"new-from-{digest[:12]}").resolve()
        assert weights_digest(load_policy(source).tensors()) == digest
        assert changed.model_copy(update={"policy": config(tmp_path).policy}) == config(tmp_path / "new")
    assert not list(tmp_path.glob(".new-from-*"))


async def test_the_same_from_goes_on_and_another_one_is_refused(tmp_path: Path, model: Path) -> None:
    finished_run(tmp_path / "old", model)
    begun = await up_module._begin_with(f"{tmp_path}/old@2", config(tmp_path / "new"), again=False)
    earlier_run(tmp_path / "new", steps=1, policy={"source": begun.policy.source})
    again = await up_module._begin_with(f"{tmp_path}/old@2", config(tmp_path / "new"), again=False)
    assert again == begun
    assert "going on" in await make_way(again)
    with pytest.raises(ConfigError, match="this one has begun with another policy"):
        await up_module._begin_with(f"{tmp_path}/old@4", config(tmp_path / "new"), again=False)
    other = await up_module._begin_with(f"{tmp_path}/old@4", config(tmp_path / "new"), again=True)
    assert "is now in" in await make_way(other, again=True)


async def test_a_copy_that_was_not_finished_is_none(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sapo_learner.policy.write_policy", full)
        with pytest.raises(OSError, match="No space"):
            await up_module._begin_with(str(model), config(tmp_path / "new"), again=False)
    assert list(tmp_path.iterdir()) == []


# ---- Signals, and the closing report


async def test_the_first_signal_asks_to_stop_and_a_closed_terminal_gets_no_more_output() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        output = io.StringIO()
        console = Console(file=output)
        stop = up_module._asked_to_stop(console)
        os.kill(os.getpid(), number)
        await asyncio.wait_for(stop.wait(), 5)
        console.print("draining ...")
        assert output.getvalue() == ("" if number == signal.SIGHUP else "draining ...\n")
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().remove_signal_handler(each)


class Local:
    """Ends as it is told to; starts nothing."""

    finishes = True

    def __init__(self, config: RunConfig, *, workers: int, back_to: int | None) -> None:
        self.config, self.stopped = config, False
        earlier_run(config.run.directory, steps=2)

    async def start(self) -> None: ...

    async def finished(self, *_: object) -> bool:
        return self.finishes

    async def stop(self) -> None: ...


@pytest.mark.parametrize("finishes", [True, False])
async def test_the_closing_report_is_the_whole_of_standard_output_with_json(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finishes: bool
) -> None:
    async def audit(_: Path) -> LedgerReport:
        return LedgerReport(0, Ledger(), 0, 0, [])

    monkeypatch.setattr(Local, "finishes", finishes)
    monkeypatch.setattr(up_module, "LocalRun", Local)
    monkeypatch.setattr(up_module, "audit_run", audit)
    monkeypatch.setattr(up_module, "summarise", lambda *_, **__: SUMMARY)
    settings = config(tmp_path / "run", policy={"source": str(model)}, sampling={"max_tokens": 16})
    code = await up_module.up(settings, terminal.console(stderr=True), again=False, report=terminal.print_json)
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert code == 0
    assert report["state"] == ("finished" if finishes else "stopped")
    assert "draining" in said.err
    if finishes:
        assert report.items() >= SUMMARY.items()
        assert report == json.loads((tmp_path / "run" / "summary.json").read_text()) | {
            "run": "test", "state": "finished", "summary": str(tmp_path / "run" / "summary.json"),
        }  # fmt: skip
    else:
        assert (report["step"], report["steps"]) == (2, 100)


SUMMARY = {
    "examples": [], "base_pass_at_1": None, "final_pass_at_1": None, "ceiling_pass_at_1": None, "tokens_trained": 0,
    "base_standard_error": None, "final_standard_error": None, "ledger_balanced": True, "steps": 2, "wall_seconds": 1.0,
}  # fmt: skip


def test_a_step_that_is_not_kept_cannot_be_gone_back_to(tmp_path: Path) -> None:
    earlier_run(tmp_path / "run", steps=2)
    with pytest.raises(NotFound, match=r"no checkpoint of step 1 \(kept are steps none\)"):
        up_module._refuse_unkept(tmp_path / "run", 1)


def test_a_run_that_began_with_another_policy_goes_on_with_its_copy(tmp_path: Path) -> None:
    earlier_run(tmp_path / "run", steps=2)
    now = config(tmp_path / "run", policy={"source": "llama"})
    assert up_module._as_it_began(now) == now
    begun = {"policy": "runs/old@3", "source": "/copies/run-from-0123", "instead_of": "llama"}
    (tmp_path / "run" / up_module.BEGUN_FROM).write_text(json.dumps(begun))
    assert up_module._as_it_began(now).policy.source == "/copies/run-from-0123"
    other = config(tmp_path / "run", policy={"source": "qwen"})
    assert up_module._as_it_began(other) == other, "who names another policy is told that it cannot change"
