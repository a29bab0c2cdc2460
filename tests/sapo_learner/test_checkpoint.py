"""Checkpoints: whole or not there (I2), exactly what was saved (I3), and the newest writer's history survives (I7)."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from sapo_learner import checkpoint
from sapo_learner.checkpoint import CheckpointState, Found, list_whole, load, load_newest, prune, save
from sapo_learner.errors import Corrupt, Fenced, NotFound

FILES = ["checkpoint.json", "model.safetensors", "optimizer.safetensors", "rng.safetensors"]


def state(step: int, **changes: Any) -> CheckpointState:
    generator = torch.Generator().manual_seed(step)
    facts: dict[str, Any] = {
        "step": step,
        "cursor": 32 * step,
        "chain": f"{step:040x}",
        "ledger": {"trained": 32 * step},
        "model": {"w": torch.randn(4, 3, generator=generator).T, "b": torch.ones(3, dtype=torch.bfloat16)},
        "optimizer": {"w.exp_avg": torch.randn(3, 4, generator=generator), "w.step": torch.tensor(float(step))},
        "rng": {"cpu": generator.get_state()},
        "environment": {"torch": torch.__version__, "threads": 1},
        "published": [step, "f" * 64],
        "extra": {"ema": 0.1 + 0.2, "nothing": None},
    }
    return CheckpointState(**(facts | changes))


def assert_equal(found: CheckpointState, expected: CheckpointState) -> None:
    for each in fields(CheckpointState):
        left, right = getattr(found, each.name), getattr(expected, each.name)
        if each.name in ("model", "optimizer", "rng"):
            assert left.keys() == right.keys()
            for name in left:
                assert left[name].dtype == right[name].dtype
                assert torch.equal(left[name], right[name])
        else:
            assert left == right


def order(directory: Path) -> list[tuple[int, int]]:
    """(token, step), newest first."""
    return [(found.token, found.step) for found in list_whole(directory)]


def flip(path: Path, at: int = -1) -> None:
    blob = bytearray(path.read_bytes())
    blob[at] ^= 1
    path.write_bytes(blob)


# ---- saving and loading


def test_i3_what_is_loaded_is_what_was_saved(tmp_path):
    path = save(tmp_path, state(10), token=2)
    assert path == tmp_path / "step-00000010-00000002"
    assert sorted(each.name for each in path.iterdir()) == FILES
    assert_equal(load(path), state(10))
    assert list_whole(tmp_path) == [Found(step=10, token=2, path=path)]


def test_a_state_with_nothing_in_it_can_be_saved(tmp_path):
    empty = state(0, model={}, optimizer={}, rng={}, published=None, extra={})
    assert_equal(load(save(tmp_path, empty, token=1)), empty)


def test_saving_again_changes_nothing_unless_the_first_is_damaged(tmp_path):
    path = save(tmp_path, state(10), token=1)
    before = path.stat().st_ino
    assert save(tmp_path, state(10), token=1) == path
    assert path.stat().st_ino == before
    flip(path / "model.safetensors")
    assert_equal(load(save(tmp_path, state(10), token=1)), state(10))


@pytest.mark.parametrize("value", [{"x": float("nan")}, {"x": object()}])
def test_facts_that_json_cannot_hold_are_refused_and_leave_nothing(tmp_path, value: Any):
    with pytest.raises((ValueError, TypeError)):
        save(tmp_path, state(1, extra=value), token=1)
    assert list(tmp_path.iterdir()) == []


def test_i2_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        events.append(f"rename to {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    final = save(tmp_path, state(1), token=1).name
    *files, inside, named, outside = events
    assert sorted(files) == [f"fsync {name}" for name in FILES]
    assert (inside, named, outside) == (f"fsync .tmp-{final}", f"rename to {final}", f"fsync {tmp_path.name}")


# ---- interrupted at any point


class Power(BaseException):
    """Stands for a kill: no `except Exception` may see it."""


@pytest.mark.parametrize("survive", range(7))
def test_i2_a_save_that_fails_at_any_point_leaves_the_older_one(tmp_path, monkeypatch, survive: int):
    """Fails at the fsync after `survive` others; each file has one, then the directory, then the parent."""
    older = save(tmp_path, state(10), token=1)
    calls = iter(range(100))
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if next(calls) == survive:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        if survive < 6:
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path, state(20), token=1)
        else:
            save(tmp_path, state(20), token=1)
    expected = 10 if survive < 5 else 20
    loaded = load_newest(tmp_path)
    assert_equal(loaded.state, state(expected))
    assert loaded.reason == ""
    assert not list(tmp_path.glob(".tmp-*"))
    assert_equal(load(older), state(10))


KILLED = """
import os, sys
from pathlib import Path
from test_checkpoint import state
from sapo_learner.checkpoint import save
fsync, left = os.fsync, int(sys.argv[2])
def dying(descriptor):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), 9)
    fsync(descriptor)
os.fsync = dying
save(Path(sys.argv[1]), state(20), token=1)
"""


@pytest.mark.parametrize("survive", [0, 2, 4])
def test_i2_kill_9_while_saving_leaves_the_older_one_and_the_next_save_tidies_up(tmp_path, survive: int):
    save(tmp_path, state(10), token=1)
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(survive)]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, timeout=60).returncode == -9
    assert len(list(tmp_path.glob(".tmp-*"))) == 1
    assert order(tmp_path) == [(1, 10)]
    assert_equal(load_newest(tmp_path).state, state(10))
    save(tmp_path, state(20), token=2)
    assert not list(tmp_path.glob(".tmp-*"))
    assert order(tmp_path) == [(2, 20), (1, 10)]


# ---- damage


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_i2_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, name: str, how: str):
    save(tmp_path, state(10), token=1)
    path = save(tmp_path, state(20), token=1)
    damaged = path / name
    if how == "missing":
        damaged.unlink()
    elif how == "cut":
        damaged.write_bytes(damaged.read_bytes()[:-5])
    else:
        flip(damaged, len(damaged.read_bytes()) // 2)
    with pytest.raises(Corrupt, match=rf"step-00000020-00000001/{name}: .*try step-00000010-00000001"):
        load(path)
    loaded = load_newest(tmp_path)
    assert_equal(loaded.state, state(10))
    assert loaded.found.step == 10
    assert str(damaged) in loaded.reason


def test_i2_an_altered_cursor_is_corrupt(tmp_path):
    path = save(tmp_path, state(10), token=1) / "checkpoint.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"cursor": facts["cursor"] + 1}))
    with pytest.raises(Corrupt, match=r"checkpoint\.json: does not check out.*no other checkpoint"):
        load(path.parent)


def test_no_checkpoint_is_not_found_and_no_whole_one_is_corrupt(tmp_path):
    with pytest.raises(NotFound, match=r"no checkpoint.*steps here: none"):
        load_newest(tmp_path / "nowhere")
    with pytest.raises(NotFound, match="no such checkpoint"):
        load(tmp_path / "step-00000001-00000001")
    flip(save(tmp_path, state(10), token=1) / "rng.safetensors")
    with pytest.raises(Corrupt, match=r"no usable checkpoint: .*rng\.safetensors"):
        load_newest(tmp_path)


def test_other_things_in_the_directory_are_ignored(tmp_path):
    path = save(tmp_path, state(10), token=1)
    (tmp_path / "step-00000011-00000001").mkdir()
    (tmp_path / "step-00000012-00000001").write_text("a file")
    shutil.copytree(path, tmp_path / "step-00000013-00000001.bak")
    shutil.copytree(path, tmp_path / ".tmp-step-00000014-00000001")
    assert order(tmp_path) == [(1, 10)]


# ---- which one is the newest (I7)


def test_i7_the_newest_tokens_history_comes_first_even_with_fewer_steps(tmp_path):
    for step in (10, 20):
        save(tmp_path, state(step), token=1)
    save(tmp_path, state(12), token=2)  # went back to 10 and on from there
    assert order(tmp_path) == [(2, 12), (1, 20), (1, 10)]
    assert load_newest(tmp_path).found.step == 12
    save(tmp_path, state(20), token=2)
    assert order(tmp_path)[0] == (2, 20)


def test_i7_an_older_writer_is_refused(tmp_path):
    save(tmp_path, state(10), token=2)
    with pytest.raises(Fenced, match="token 2 saves here, ours is 1"):
        save(tmp_path, state(99), token=1)
    assert order(tmp_path) == [(2, 10)]


def test_i7_an_older_writer_leaves_the_newers_work_in_progress_alone(tmp_path):
    in_progress = tmp_path / ".tmp-step-00000012-00000002"
    in_progress.mkdir()
    save(tmp_path, state(20), token=1)
    assert in_progress.is_dir()


def test_a_step_can_be_asked_for(tmp_path):
    for step, token in ((10, 1), (20, 1), (10, 3), (20, 3)):
        save(tmp_path, state(step), token=token)
    assert load_newest(tmp_path, 10).found == Found(10, 3, tmp_path / "step-00000010-00000003")
    flip(tmp_path / "step-00000010-00000003" / "model.safetensors")
    assert load_newest(tmp_path, 10).found.token == 1
    with pytest.raises(NotFound, match=r"no checkpoint of step 15.*steps here: 10, 20"):
        load_newest(tmp_path, 15)


def test_i2_a_checkpoint_of_a_branch_that_the_log_left_is_passed_over(tmp_path):
    for step in (10, 20):
        save(tmp_path, state(step), token=1)
    loaded = load_newest(tmp_path, belongs=lambda cursor, chain: (cursor, chain) == (320, f"{10:040x}"))
    assert loaded.found.step == 10
    assert "the log does not have its entry 640" in loaded.reason


# ---- pruning (I6)


def test_i6_prune_keeps_the_newest_in_that_order(tmp_path):
    for step, token in ((10, 1), (20, 1), (12, 2), (14, 2)):
        save(tmp_path, state(step), token=token)
    assert [path.name for path in prune(tmp_path, 3)] == ["step-00000010-00000001"]
    assert order(tmp_path) == [(2, 14), (2, 12), (1, 20)]
    prune(tmp_path, 1)
    assert order(tmp_path) == [(2, 14)]
    assert prune(tmp_path, 1) == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000014-00000002"]


def test_i6_prune_never_deletes_what_was_just_saved(tmp_path):
    for step in (30, 40, 20):
        saved = save(tmp_path, state(step), token=1)
    assert prune(tmp_path, 2, saved=saved) == []
    prune(tmp_path, 1, saved=saved)
    assert order(tmp_path) == [(1, 40), (1, 20)]


def test_i6_a_damaged_checkpoint_does_not_push_out_a_whole_one(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, state(step), token=1)
    (tmp_path / "step-00000030-00000001" / "model.safetensors").unlink()
    assert prune(tmp_path, 2) == []
    assert order(tmp_path) == [(1, 20), (1, 10)]


def test_the_base_stays_for_ever(tmp_path):
    for step, token in ((0, 1), (10, 1), (20, 1), (0, 2), (10, 2)):
        save(tmp_path, state(step), token=token)
    assert {path.name for path in prune(tmp_path, 2)} == {"step-00000010-00000001", "step-00000020-00000001"}
    assert order(tmp_path) == [(2, 10), (2, 0), (1, 0)]
    assert checkpoint.oldest_cursor(tmp_path) == 0, "somebody went back to step 0 under token 2"
    for step in (20, 30):
        save(tmp_path, state(step), token=2)
    prune(tmp_path, 2)
    assert order(tmp_path) == [(2, 30), (2, 20), (1, 0)]
    assert checkpoint.oldest_cursor(tmp_path) == 32 * 20
    prune(tmp_path, 1, base=False)
    assert order(tmp_path) == [(2, 30)]
    save(tmp_path, state(0), token=3)
    assert checkpoint.oldest_cursor(tmp_path) == 0, "the newest is never set aside"


def test_nothing_is_prunable_while_the_base_is_all_there_is(tmp_path):
    assert checkpoint.oldest_cursor(tmp_path) == 0
    save(tmp_path, state(0), token=1)
    assert checkpoint.oldest_cursor(tmp_path) == 0
    assert prune(tmp_path, 1) == []
    damaged = save(tmp_path, state(10), token=1) / "checkpoint.json"
    damaged.write_text(damaged.read_text().replace('"step": 10', '"step": 11'))
    assert checkpoint.oldest_cursor(tmp_path) == 0, "a damaged one needs nothing, and sets no other aside"


def test_a_prune_that_is_killed_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    for step in (10, 20):
        save(tmp_path, state(step), token=1)

    def dying(path: Path, **_: Any) -> None:
        (path / "checkpoint.json").unlink()
        raise Power

    monkeypatch.setattr(checkpoint.shutil, "rmtree", dying)
    with pytest.raises(Power):
        prune(tmp_path, 1)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000020-00000001"]
