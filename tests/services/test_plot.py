"""`sapo plot`: a real record fills every panel, and the curves are the lines of the record."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.curves import PANELS, Recorded, Series
from services.plotting import POINTS, _alone, _thinned
from tests.command_line import sapo
from tests.services.recorded_steps import trained_run

torch.set_num_threads(1)
PNG = b"\x89PNG\r\n"


def evaluation(step: int, mean: float, **fields: Any) -> dict[str, Any]:
    return {"kind": "evaluation", "time": 1.0, "step": step, "pass_at_1": mean, "standard_error": 0.01, **fields}


def append(directory: Path, *lines: dict[str, Any]) -> None:
    with (directory / "record.jsonl").open("a") as record:
        record.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = trained_run(tmp_path_factory.mktemp("runs") / "trained", steps=6)
    (first, *_, last) = Recorded.read(directory, "").steps
    busy = {"kind": "busy", "time": 1.0, "worker": "a", "intervals": [[first["started"], last["ended"]]]}
    append(directory, evaluation(0, 0.2, interval_95=[0.1, 0.5]), busy, evaluation(5, 0.6))
    return directory


def step(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "step", "time": 100.0 + number, "step": number, "tokens": 10, "policy_age_mean": 1.0,
        "policy_age_max": 1, "outcomes": {"trained": 2, "stale": 0}, "started": 10.0 * number + 2,
        "ended": 10.0 * number + 10, "waited_seconds": 2.0, "reward": 0.5, "response_tokens": 5.0, "stopped": 1.0,
        "entropy": 1.0, "log_ratio_std": 0.1, "seconds": {"backward": 1.0, "optimizer": 0.5}, **fields,
    }  # fmt: skip


def written(directory: Path, *lines: dict[str, Any]) -> Recorded:
    directory.mkdir(exist_ok=True)
    append(directory, *lines)
    return Recorded.read(directory, "run")


def series(run: Recorded, name: str) -> dict[str, Series]:
    (panel,) = [each for each in PANELS if each.name == name]
    return {each.label: each for each in panel.series(run)}


# ---- what is drawn


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.name)
def test_a_real_record_fills_every_panel(trained: Path, panel: Any) -> None:
    found = panel.series(Recorded.read(trained, "run"))
    assert found
    for each in found:
        assert each.x.shape == each.y.shape
        assert np.isfinite(each.y).any(), each.label


def test_curves_are_the_lines_of_the_record(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "record.jsonl").read_text().splitlines()]
    steps, run = [line for line in lines if line["kind"] == "step"], Recorded.read(trained, "run")
    assert series(run, "reward")[""].y.tolist() == [line["reward"] for line in steps]
    gate = series(run, "weight_negative")["gate"]
    for values, name in [(gate.y, "gate"), (gate.low, "gate_p10"), (gate.high, "gate_p90")]:
        assert values is not None
        assert values.tolist() == [line["diagnostics"][name]["negative"] for line in steps]
    spread = {label: each.y[-1] for label, each in series(run, "log_ratio").items()}
    assert spread["age 5 to 8"] == steps[-1]["diagnostics"]["log_ratio_std"]["age_5_8"]
    assert [*spread] == ["age 0", "age 1", "age 2", "age 3 to 4", "age 5 to 8"]
    mean = series(run, "pass_at_1")[""]
    assert (mean.x.tolist(), mean.y.tolist()) == ([0, 5], [0.2, 0.6])
    assert mean.low is not None
    assert mean.low.tolist() == pytest.approx([0.1, 0.6 - 1.96 * 0.01])


def test_a_step_that_was_taken_again_counts_once_and_what_came_after_it_on_the_old_branch_does_not(
    tmp_path: Path,
) -> None:
    old = [step(number, reward=0.1) for number in (1, 2, 3, 4)]
    run = written(tmp_path, *old, evaluation(4, 0.9), evaluation(2, 0.4), *(step(n, reward=0.7) for n in (2, 3)))
    with (tmp_path / "record.jsonl").open("a") as record:
        record.write('{"kind": "step", "step": 4, "rew')  # torn, as a kill leaves it
    assert Recorded.read(tmp_path, "run").steps == run.steps
    assert run.numbers.tolist() == [1, 2, 3]
    assert series(run, "reward")[""].y.tolist() == [0.1, 0.7, 0.7]
    assert [line["step"] for line in run.evaluations] == [2]


def test_a_step_without_a_token_to_learn_from_has_no_entropy_and_no_age(tmp_path: Path) -> None:
    run = written(tmp_path, step(1), step(2, tokens=0, entropy=0.0, policy_age_mean=0.0, policy_age_max=0))
    for name in ("entropy", "policy_age", "log_ratio"):
        for each in series(run, name).values():
            assert np.isfinite(each.y).tolist() == [True, False], name
    assert series(run, "reward")[""].y.tolist() == [0.5, 0.5]


def test_who_waits(tmp_path: Path) -> None:
    """Steps last 10 s, of which the learner waits 2; of step 1 engine a samples half, b came in step 2."""
    busy = [("a", [[5.0, 6.0], [10.0, 14.0], [12.0, 15.0], [20.0, 30.0]]), ("b", [[28.0, 30.0]]), ("b", [[27.0, 29.0]])]
    lines = [{"kind": "busy", "time": 1.0, "worker": worker, "intervals": intervals} for worker, intervals in busy]
    run = written(tmp_path, step(1), *lines, step(2))
    waiting = series(run, "waiting")
    assert waiting["learner waits for groups"].y.tolist() == pytest.approx([0.2, 0.2])
    assert waiting["engines stand still"].y.tolist() == pytest.approx([0.5, (0 + 0.7) / 2])
    times = {label: each.y.tolist() for label, each in series(run, "step_time").items()}
    assert times == {"whole step": [10], "update": [1.5], "waiting for groups": [2]}, "without the first"
    assert series(run, "tokens")[""].y.tolist() == [1, 1]
    assert series(run, "progress")[""].x.tolist() == pytest.approx([1 / 6, 2 / 6])


def test_points_stand_for_several_steps_of_a_long_run() -> None:
    y = np.arange(2 * POINTS + 1, dtype=float)
    y[:2] = np.nan, 5.0
    x, mean, low, _ = _thinned(Series("", np.arange(len(y), dtype=float), y, low=y))
    assert len(x) == len(mean) == -(-len(y) // 3)
    assert (x[1], mean[0], mean[1], mean[-1]) == (4, 3.5, 4, y[-2:].mean())
    assert low.tolist() == mean.tolist()
    assert [*_thinned(Series("", y, y, largest=True))][1][:2].tolist() == [5, 5]
    assert _alone(np.array([1, np.nan, 2, 3, np.nan, 4])).tolist() == [True, False, False, False, False, True]


# ---- the command


def test_it_prints_the_paths_and_the_same_record_gives_the_same_pictures(trained: Path, tmp_path: Path) -> None:
    outcome = sapo("plot", trained)
    paths = [Path(line) for line in outcome.out.splitlines()]
    assert (outcome.code, outcome.err) == (0, "")
    assert paths == [trained / "plots" / f"{name}.png" for name in ("learning", "health", "speed", "objective")]
    again = json.loads(sapo("plot", trained, "--out", tmp_path / "new" / "place", "--json").out)["files"]
    for one, other in zip(paths, map(Path, again), strict=True):
        assert one.read_bytes().startswith(PNG)
        assert one.read_bytes() == other.read_bytes()


def test_several_runs_lie_over_one_another_also_those_with_less_on_record(trained: Path, tmp_path: Path) -> None:
    written(tmp_path / "trained", step(1), step(2))
    alone = Path(sapo("plot", tmp_path / "trained").out.splitlines()[0])
    names = [Path(line).name for line in sapo("plot", tmp_path / "trained").out.splitlines()]
    assert names == ["learning.png", "health.png", "speed.png"], "nothing is on record for objective.png"
    outcome = sapo("plot", tmp_path / "trained", trained, "--out", tmp_path / "both")
    assert (outcome.code, len(outcome.out.splitlines())) == (0, 4)
    assert (tmp_path / "both" / "learning.png").read_bytes() != alone.read_bytes()


def test_only_the_metrics_that_are_asked_for(trained: Path, tmp_path: Path) -> None:
    outcome = sapo("plot", trained, "--metrics", "reward, waiting", "--out", tmp_path)
    assert [Path(line).name for line in outcome.out.splitlines()] == ["learning.png", "speed.png"]
    outcome = sapo("plot", trained, "--metrics", "reward,spead")
    assert outcome.code == 2
    assert "unknown metric 'spead'" in outcome.err
    assert all(panel.name in outcome.err for panel in PANELS)


def test_what_cannot_be_plotted_is_said_in_one_sentence(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = sapo("plot", tmp_path)
    assert outcome.code == 5
    assert "no record.jsonl there" in outcome.err
    append(tmp_path, {"kind": "session", "time": 1.0}, evaluation(0, 0.1))
    outcome = sapo("plot", trained, tmp_path)
    assert (outcome.code, outcome.out) == (8, "")
    assert outcome.err.startswith(f"sapo: {tmp_path}: the run has done no step yet (")
    assert sapo("plot", *[trained] * 8).code == 2
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    outcome = sapo("plot", trained)
    assert outcome.code == 2
    assert outcome.err.endswith("(pip install 'sapo[plot]')\n")
    assert outcome.err.count("\n") == 1
