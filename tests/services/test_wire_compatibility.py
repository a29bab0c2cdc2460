"""The wire only grows: `buf breaking` against the committed image of what is in use, and what it would find."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUF = Path(sys.executable).with_name("buf")
BASELINE = ROOT / "protos" / "baseline.binpb"
INGEST, TRAJECTORY = "sapo/v1/ingest.proto", "sapo/v1/trajectory.proto"


def buf(*arguments: str | Path, directory: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([BUF, *arguments], cwd=directory, capture_output=True, text=True, check=False, timeout=60)


def breaks(directory: Path = ROOT) -> str:
    """What would break whoever speaks the baseline; "" when nothing does."""
    found = buf("breaking", "--against", BASELINE, directory=directory)
    assert found.returncode in (0, 100), found.stderr  # 100: there are findings; all else: it did not look
    return found.stdout


@pytest.fixture
def protos(tmp_path: Path) -> Path:
    """A copy to be changed."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    return tmp_path


def test_the_wire_is_compatible_with_what_is_in_use() -> None:
    assert breaks() == "", "a worker of the version before could not speak with this ingest"


def test_the_baseline_knows_all_of_the_wire(tmp_path: Path) -> None:
    """What it did not know could be taken away again."""
    image = tmp_path / "now.binpb"
    assert buf("build", "--exclude-source-info", "-o", image).returncode == 0
    assert image.read_bytes() == BASELINE.read_bytes(), "run `make protos`"


BREAKING = {
    "a field gone": (TRAJECTORY, "  uint64 seed = 7;\n", "", 'field "7" with name "seed"'),
    "another number": (TRAJECTORY, "uint64 draw = 2;", "uint64 draw = 20;", 'field "2" with name "draw"'),
    "another type": (TRAJECTORY, "uint32 epoch = 6;", "uint64 epoch = 6;", 'changed type from "uint32" to "uint64"'),
    "another name": (TRAJECTORY, "string engine = 11;", "string motor = 11;", 'name from "engine" to "motor"'),
    "repeated no more": (TRAJECTORY, "repeated Trajectory trajectories", "Trajectory trajectories", "cardinality"),
    "an enum's value gone": (INGEST, "    STATUS_EXPIRED = 3;\n", "", 'enum value "3" on enum "Status"'),
    "an enum's value moved": (TRAJECTORY, "DTYPE_BOOL = 3;", "DTYPE_BOOL = 4;", 'enum value "3" on enum "DType"'),
    "a message gone": (INGEST, "message Credits {", "message Credit {", "Credits"),
    "out of its oneof": (INGEST, "Hello hello = 1;", "Hello hello = 9;", '"hello"'),
    "a method gone": (INGEST, "rpc StreamTrajectoryGroups(", "rpc StreamGroups(", "StreamTrajectoryGroups"),
    "a stream no more": (INGEST, "returns (stream Stream", "returns (Stream", "server streaming"),
}


@pytest.mark.parametrize("change", BREAKING)
def test_a_change_that_breaks_somebody_is_found(protos: Path, change: str) -> None:
    name, before, after, said = BREAKING[change]
    path = protos / "protos" / name
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))
    assert said in breaks(protos)


def test_what_is_only_added_breaks_nobody(protos: Path) -> None:
    path = protos / "protos" / TRAJECTORY
    added = "message TrajectoryGroup {\n  // New.\n  string region = 14;\n"
    path.write_text(path.read_text().replace("message TrajectoryGroup {\n", added) + "\nmessage Image {}\n")
    assert breaks(protos) == ""
