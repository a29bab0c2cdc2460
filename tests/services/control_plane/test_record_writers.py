"""Where else the record goes: TensorBoard, Weights & Biases, your own. Whatever becomes of them, the run goes on."""

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sapo_learner.errors import ConfigError
from services.control_plane import writer_threads
from services.control_plane.plane import ControlPlane
from services.control_plane.record import read
from services.control_plane.writer_threads import WriterThread
from services.preflight import check
from services.record_writers import Line, RecordWriter, Run, figures, writer_classes
from services.record_writers.tensorboard import TensorBoard
from services.runstore import EmbeddedRedis, RunStore
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.settings import RunConfig
from tests.documents import ROOT, files
from tests.full_disk import no_file_beyond
from tests.small_run import Learner, control_plane, run_config

MINE = """
from services.record_writers import RecordWriter

class Mine(RecordWriter):
    def __init__(self, run):
        self.file = (run.directory / "mine").open("w")
        self.file.write(f"{run.name} {run.config['run']['seed']}\\n")

    def write(self, line):
        print(line["kind"], file=self.file)

    def close(self):
        self.file.write("closed")
        self.file.close()
"""


def line(step: int, **fields: Any) -> dict[str, Any]:
    return {"kind": "step", "time": 1000.0 + step, "step": step, **fields}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run("demo", "demo-1f", tmp_path, {})


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard itself reads them."""
    events = EventAccumulator(str(directory)).Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# ---- TensorBoard


def test_tensorboard_reads_every_figure_of_a_step_at_its_step_and_time(run: Run) -> None:
    writer = TensorBoard(run)
    writer.write(line(1, reward=0.5, seconds={"forward": 2}, diagnostics={"gate": {"positive": 0.25}}, applied=True))
    writer.write(line(2, reward=0.75, refusal="text", mfu=None, started=1.0, seconds={"forward": float("nan")}))
    writer.write({"kind": "session", "time": 3.0})
    writer.write({"kind": "evaluation", "time": 3.0, "step": 1, "pass_at_1": 0.5, "suites": {"tiny": {"pass_at_1": 1}}})
    writer.close()
    found = scalars(run.directory / "tensorboard" / "steps")
    assert found.pop("step/reward") == [(1, 0.5), (2, 0.75)]
    assert [step for step, _ in found.pop("seconds/forward")] == [1, 2]
    assert found == {"diagnostics/gate/positive": [(1, 0.25)], "step/applied": [(1, 1.0)]}
    assert scalars(run.directory / "tensorboard" / "others") == {
        "evaluation/pass_at_1": [(1, 0.5)], "evaluation/suites/tiny/pass_at_1": [(1, 1.0)],
    }  # fmt: skip
    events = EventAccumulator(str(run.directory / "tensorboard" / "steps")).Reload()
    assert [each.wall_time for each in events.Scalars("step/reward")] == [1001.0, 1002.0]


@pytest.mark.parametrize("restarted", [False, True])
def test_of_a_step_that_was_taken_again_the_last_counts_and_evaluations_stay(run: Run, restarted: bool) -> None:
    writer = TensorBoard(run)
    for step in (1, 2, 3, 4):
        writer.write(line(step, reward=float(step)))
    writer.write({"kind": "evaluation", "time": 3.0, "step": 4, "pass_at_1": 0.5})
    if restarted:
        writer.close()
        writer = TensorBoard(run)
    writer.write(line(3, reward=30.0))
    writer.close()
    assert scalars(run.directory / "tensorboard" / "steps") == {"step/reward": [(1, 1), (2, 2), (3, 30)]}
    assert scalars(run.directory / "tensorboard" / "others") == {"evaluation/pass_at_1": [(4, 0.5)]}


@pytest.mark.parametrize("room", [0, 7, 30])
def test_a_full_disk_costs_tensorboard_the_lines_of_that_time_alone(run: Run, room: int) -> None:
    writer = TensorBoard(run)
    writer.write(line(1, reward=1.0))
    (file,) = (run.directory / "tensorboard" / "steps").iterdir()
    for left in (file.stat().st_size + room, 5):  # in the middle of an event, then in the next file's first one
        with no_file_beyond(left), pytest.raises(OSError, match="too large"):
            writer.write(line(2, reward=2.0))
    writer.write(line(3, reward=3.0))
    writer.close()
    assert scalars(run.directory / "tensorboard" / "steps") == {"step/reward": [(1, 1), (3, 3)]}


def test_the_control_plane_writes_them_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from services.control_plane import service; "
        "from services.record_writers import Run; from services.record_writers.tensorboard import TensorBoard; "
        "writer = TensorBoard(Run('r', 'r', Path(sys.argv[1]), {})); "
        "writer.write({'kind': 'step', 'time': 1.0, 'step': 1, 'reward': 1}); writer.close(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'tensorflow')))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert scalars(tmp_path / "tensorboard" / "steps") == {"step/reward": [(1, 1.0)]}


def test_a_line_without_a_step_has_no_figures() -> None:
    assert figures({"kind": "busy", "time": 1.0, "intervals": [[1, 2]]}) == {}
    assert figures({"kind": "warm_start", "time": 1.0, "steps": 7}) == {}


# ---- threads


class Scripted(RecordWriter):
    """Writes when `go` is set, and raises when `broken` says what."""

    def __init__(self) -> None:
        self.go, self.broken = threading.Event(), ""
        self.taken: list[int] = []
        self.begun = threading.Event()
        self.closed = False

    def write(self, line: Line) -> None:
        self.begun.set()
        self.go.wait()
        if self.broken:
            raise RuntimeError(self.broken)
        self.taken.append(line["step"])

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def writer() -> Iterator[Scripted]:
    scripted = Scripted()
    yield scripted
    scripted.go.set()  # so that its thread ends


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_slow_writer_holds_nobody_up_and_loses_the_oldest_lines(
    writer: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_threads, "WAITING", 3)
    lost: list[str] = []
    thread = WriterThread("slow", lambda: writer, lost.append)
    thread.put(line(0))
    assert writer.begun.wait(20)
    for step in range(1, 7):
        thread.put(line(step))
    assert lost == ["too slow"] * 3
    writer.go.set()
    thread.close()
    assert (writer.taken, writer.closed) == ([0, 4, 5, 6], True)


def test_one_that_hangs_does_not_keep_the_process(
    writer: Scripted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer_threads, "CLOSE_SECONDS", 0.05)
    thread = WriterThread("gone", lambda: writer, lambda _: None)
    thread.put(line(0))
    thread.close()
    assert "record writer gone did not end in time" in caplog.text
    assert thread._thread.daemon


async def test_what_fails_is_said_once_until_it_works_again_and_every_line_is_counted(
    writer: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    lost: list[str] = []
    thread = WriterThread("w", lambda: writer, lost.append)
    writer.go.set()
    for outage, steps in enumerate(((1, 2, 3), (5, 6))):
        writer.broken = "no\nserver"
        for step in steps:
            thread.put(line(step))
        await until(lambda: len(lost) == sum((3, 2)[: outage + 1]))  # noqa: B023
        writer.broken = ""
        thread.put(line(steps[-1] + 1))
        await until(lambda: writer.taken[-1:] == [steps[-1] + 1])  # noqa: B023
    thread.close()
    assert lost == ["failed"] * 5
    assert [each.message for each in caplog.records] == [
        "record writer w: RuntimeError: no server; the run goes on, and lines are lost to it",
        "record writer w writes again; 3 lines were lost to it",
        "record writer w: RuntimeError: no server; the run goes on, and lines are lost to it",
        "record writer w writes again; 2 lines were lost to it",
    ]


async def test_one_that_cannot_be_opened_is_tried_again_with_the_next_line(writer: Scripted) -> None:
    tries: list[Exception | Scripted] = [OSError("no room"), writer]
    lost: list[str] = []

    def opened() -> Scripted:
        found = tries.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    thread = WriterThread("w", opened, lost.append)
    writer.go.set()
    thread.put(line(1))
    thread.put(line(2))
    thread.close()
    assert (writer.taken, lost) == ([2], ["failed"])


# ---- in a run


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    (tmp_path / "mine.py").write_text(MINE)
    return run_config(tmp_path / "run", record={"writers": [str(tmp_path / "mine.py"), "tensorboard"]})


async def test_every_line_of_the_record_goes_to_every_writer(config: RunConfig, redis: EmbeddedRedis) -> None:
    async with control_plane(config, redis.url) as running:
        learner = await Learner(running).start()
        await learner.report("training", step=1, record={"kind": "step", "step": 1, "reward": 0.5})
    kinds = [each["kind"] for each in read(config.run.directory / "record.jsonl")]
    mine = (config.run.directory / "mine").read_text().splitlines()
    assert mine == [f"{config.run.name} {config.run.seed}", *kinds, "closed"]
    assert scalars(config.run.directory / "tensorboard" / "steps") == {"step/reward": [(1, 0.5)]}


def test_the_document_s_own_writer_does_what_it_says(run: Run) -> None:
    path = run.directory / "slow_steps.py"
    path.write_text(files(ROOT / "docs/seeing.md")[path.name])
    (found,) = writer_classes([str(path)]).values()
    writer = found(run)
    writer.write({"kind": "session", "time": 1.0})
    writer.write(line(1, started=0.0, ended=10.0, seconds={}))
    writer.write(line(2, started=0.0, ended=61.0, seconds={"read": 60}))
    writer.close()
    assert (run.directory / "slow-steps").read_text() == "2 {'read': 60}\n"


@pytest.mark.parametrize(
    ("how", "reason"), [("raise OSError('it is gone')", "failed"), ("import threading; threading.Event().wait()", "")]
)
async def test_a_run_does_not_notice_a_writer_that_fails_or_hangs(
    config: RunConfig, redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch, how: str, reason: str
) -> None:
    monkeypatch.setattr(writer_threads, "CLOSE_SECONDS", 0.05)
    Path(config.record.writers[0]).write_text(MINE.replace('print(line["kind"], file=self.file)', how))
    async with control_plane(config, redis.url) as running:
        learner = await Learner(running).start()
        for step in (1, 2, 3):
            await learner.report("training", step=step, record={"kind": "step", "step": step})
        assert (await running.client.status())["last_step"]["step"] == 3
        metric = ("sapo_record_writer_lost_lines_total", {"writer": config.record.writers[0], "reason": reason})
        value = running.plane._metrics.registry.get_sample_value
        await until(lambda: not reason or (value(*metric) or 0) >= 3)
    steps = [each["step"] for each in read(config.run.directory / "record.jsonl") if each["kind"] == "step"]
    assert steps == [1, 2, 3]


# ---- what cannot be


def mistakes(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    (tmp_path / "bare.py").write_text(MINE.replace("(RecordWriter):", "(RecordWriter):\n    module = 'not_there'"))
    own = str(tmp_path / "bare.py")
    return {
        "unknown": (["tensorbord"], r"unknown writer 'tensorbord', did you mean 'tensorboard'\?"),
        "twice": (["wandb", "tensorboard", "wandb"], "record.writers: 'wandb' comes twice"),
        "missing": (
            ["tensorboard"],
            r"record.writers tensorboard: tensorboard is not installed \(pip install 'sapo\[tensorboard\]'\)",
        ),
        "its own": ([own], rf"record.writers {own}: not_there is not installed \(pip install not_there\)"),
    }


@pytest.mark.parametrize("mistake", ["unknown", "twice", "missing", "its own"])
async def test_a_mistake_is_said_before_anything_starts(
    mistake: str, tmp_path: Path, redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers, says = mistakes(tmp_path)[mistake]
    if mistake == "missing":
        monkeypatch.setitem(sys.modules, "tensorboard", None)
    if mistake == "twice":
        pytest.importorskip("wandb")
    config = run_config(tmp_path / "run", record={"writers": writers})
    with pytest.raises(ConfigError, match=says):
        writer_classes(config.record.writers)
    with pytest.raises(ConfigError, match=says):
        check(config)
    async with await RunStore.connect(redis.url, config.run.name) as store:
        with pytest.raises(ConfigError, match=says):
            ControlPlane(config, store, 1, ControlPlaneMetrics())


# ---- Weights & Biases, as far as it can be tried without a server

WANDB = """
import sys, time
from pathlib import Path
from services.control_plane import writer_threads
from services.runtime.logging import configure
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.settings import RunConfig

configure("control-plane")
writer_threads.CLOSE_SECONDS = float(sys.argv[2])
run = {"name": "demo", "dir": sys.argv[1]}
config = RunConfig.model_validate({"run": run, "record": {"writers": ["wandb"]}})
(thread,) = writer_threads.started(config, ControlPlaneMetrics())
for step in (1, 2, 2):
    thread.put({"kind": "step", "time": time.time(), "step": step, "reward": 0.5, "seconds": {"forward": 1}})
print("put", flush=True)
thread.close()
"""


def wandb(directory: Path, close_seconds: float, **environment: str) -> str:
    pytest.importorskip("wandb")
    directory.mkdir(exist_ok=True)
    home = {"HOME": str(directory), "WANDB_CONFIG_DIR": str(directory), "WANDB_CACHE_DIR": str(directory)}
    done = subprocess.run(
        [sys.executable, "-c", WANDB, directory, str(close_seconds)], capture_output=True, text=True, timeout=100,
        env={name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | home | environment,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "put\n"), done.stderr
    return done.stderr


def test_wandb_writes_a_run_that_can_be_synchronised_later(tmp_path: Path) -> None:
    errors = wandb(tmp_path / "run", 60, WANDB_MODE="offline")
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-demo-*.wandb")
    data = file.read_bytes()
    assert all(name in data for name in (b"step/reward", b"seconds/forward", b"optimizer_step"))
    assert "ERROR" not in errors


def test_a_wandb_that_cannot_be_reached_is_one_line_and_the_process_ends(tmp_path: Path) -> None:
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4}
    errors = wandb(tmp_path / "run", 0.5, **nobody)
    assert 1 <= errors.count("record writer wandb") <= 2, "that it fails, or that it did not end in time, or both"
    assert "Traceback" not in errors
