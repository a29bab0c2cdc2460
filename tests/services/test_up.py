"""Before anything starts: what is wrong is said at once, and an earlier run in the same directory is treated right."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sapo_learner.config import parse
from sapo_learner.errors import ConfigError, SapoError
from services import up as up_module
from services.run_directory import LocalServices, live_services, stopped_status
from services.runtime.settings import RunConfig, dump_config
from services.view import Pace, _line, _panel, print_status


def config(directory: Path, **sections: Any) -> RunConfig:
    return parse(RunConfig, {"run": {"name": "test", "dir": str(directory)}, **sections}, where="test")


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
        ({"policy": {"source": "/nowhere"}}, r"policy\.source /nowhere: no config\.json there"),
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
    import psutil

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

    def __init__(self, directory: Path, status: dict[str, Any]) -> None:
        self.config, self.status, self.children = config(directory), status, dict[str, Any]()


def status(**fields: Any) -> dict[str, Any]:
    step = {
        "reward": 0.5, "entropy": 0.1, "log_ratio_std": 0.1, "policy_age_mean": 1.0, "policy_age_max": 2, "tokens": 9,
    }  # fmt: skip
    evaluations = [{"pass_at_1": index / 20, "step": index} for index in range(12)]
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
