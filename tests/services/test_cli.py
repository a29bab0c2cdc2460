"""The command line: help with examples everywhere, one sentence and an exit code for every likely mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sapo_learner.errors import SapoError
from services.cli import app

COMMANDS = [
    ["up"], ["config"], ["status"], ["ledger"], ["eval"], ["sample"],
    ["serve", "control-plane"], ["serve", "ingest"], ["serve", "learner"], ["serve", "rollout"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"sapo {' '.join(command)}" in result.output


def error_of(*arguments: str) -> SapoError:
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, SapoError), result.output
    return result.exception


def test_config_prints_a_file_that_config_reads(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["config", "--set", "objective.tau_neg=1.1"]).output
    path = tmp_path / "run.yaml"
    path.write_text(printed)
    again = CliRunner().invoke(app, ["config", str(path)])
    assert again.output == printed
    assert "tau_neg: 1.1" in printed


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective.name=sappo", "did you mean 'sapo'"),
        ("objective.tau_negg=1", "did you mean 'tau_neg'"),
        ("objective.tau_pos=-1", "greater than 0"),
        ("trainin.steps=3", "did you mean 'training'"),
        ("training.steps=many", "training.steps"),
        ("pacing.lookahead=9", "exceeds training.max_policy_age"),
    ],
)
def test_a_wrong_setting_is_one_sentence_before_anything_starts(override: str, expected: str) -> None:
    error = error_of("config", "--set", override)
    assert expected in str(error)
    assert error.exit_code == 2
    assert "\n" not in str(error)


def test_status_of_nothing_says_so(tmp_path: Path) -> None:
    assert "no such directory" in str(error_of("status", str(tmp_path / "none")))
    assert "no `sapo up` runs" in str(error_of("status", str(tmp_path)))


def test_ledger_of_nothing_says_so(tmp_path: Path) -> None:
    assert "no run.yaml" in str(error_of("ledger", str(tmp_path)))


def test_policy_that_is_none_says_what_one_is(tmp_path: Path) -> None:
    assert "neither a run directory" in str(error_of("eval", str(tmp_path)))


def test_the_entry_point_prints_one_line_and_exits_with_its_code(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "services.cli", "up", str(tmp_path / "none.yaml")], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr == f"sapo: {tmp_path}/none.yaml: no such file (`sapo config` prints a complete example)\n"
    assert "Traceback" not in result.stderr


def test_control_plane_ingest_and_command_line_start_without_torch() -> None:
    modules = "services.cli, services.control_plane.service, services.ingest.service, services.up, services.view"
    program = f"import sys, json\nimport {modules}\nprint(json.dumps([m for m in sys.modules if m in {{'torch'}}]))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []
