"""The command line: help with examples everywhere, exit codes, JSON for scripts, and no lie without a terminal."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from sapo_learner.errors import SapoError
from sapo_learner.policy import tiny_policy, write_policy
from services import terminal
from services.cli import app
from services.runtime.http import probe_app, serving
from services.runtime.lifecycle import Lifecycle
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.settings import dump_config
from tests.command_line import Outcome, sapo
from tests.small_run import Learner, Running, heartbeat, lease_request


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command that does something, as it is typed."""
    inner = getattr(command, "commands", {})
    yield from () if inner else (path,)
    for name, each in inner.items():
        yield from commands(each, (*path, name))


COMMANDS = sorted(commands(typer.main.get_command(app)))


def test_the_commands_are_found() -> None:
    assert {("up",), ("health",), ("serve", "rollout")} <= set(COMMANDS)
    assert len(COMMANDS) >= 11


@pytest.mark.parametrize("columns", ["30", "300"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_examples_that_are_whole_whatever_columns_says(
    command: tuple[str, ...], columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    outcome = sapo(*command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    _, _, examples = outcome.out.partition("Examples:\n")
    first = examples.splitlines()[0].strip()
    assert re.match(rf"(\S+=\S+ )*sapo {' '.join(command)}( |$)", first), outcome.out
    assert not re.search("[\x1b…─│]", outcome.out)


def test_help_ends_with_the_exit_codes_of_the_error_tree() -> None:
    lines = [line.strip() for line in sapo("--help").out.splitlines()]
    table = lines[lines.index("Exit codes:") + 1 :]
    for kind in SapoError.__subclasses__():
        assert f"{kind.exit_code}  {kind.__doc__}" in table
    assert table[0].startswith("0  ")
    assert table[-1].startswith("130  ")
    assert [int(line.split()[0]) for line in table] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 130]


def test_the_list_of_commands_is_not_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert "exits with 0 if it is and with 8 if it is not, saying for what it waits." in sapo("--help").out
    assert "Usage: sapo serve" in sapo("serve").err


# ---- JSON, and the same for people


def test_config_prints_a_file_that_config_reads(tmp_path: Path) -> None:
    printed = sapo("config", "--set", "objective.tau_neg=1.1").out
    path = tmp_path / "run.yaml"
    path.write_text(printed)
    assert sapo("config", path).out == printed
    assert "tau_neg: 1.1" in printed
    assert json.loads(sapo("config", path, "--json").out)["objective"] == {
        "name": "sapo", "gate": "sigmoid", "tau_pos": 1.0, "tau_neg": 1.1, "positive_ramp": False, "age_full": 4,
    }  # fmt: skip


def test_config_says_on_standard_error_that_nothing_will_be_measured(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    model = tmp_path / "m"
    write_policy(tiny_policy("0123456789+=", seed=0), model)
    settings = ["task.name=jsonl", f"task.path={tmp_path}/p.jsonl", "task.held_out_fraction=1e-9"]
    settings.append("sampling.max_tokens=16")
    outcome = sapo("config", *(f"--set={each}" for each in [*settings, f"policy.source={model}"]), "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["task"]["held_out_fraction"] == 1e-9
    assert outcome.err == "sapo: no prompt of task jsonl is held out: its pass@1 will not be measured\n"


def test_an_explanation_as_json() -> None:
    answer = json.loads(sapo("config", "--explain", "training.steps", "--json").out)
    assert answer["key"] == "training.steps"
    assert answer["lines"] == sapo("config", "--explain", "training.steps").out.splitlines()
    assert "working directory" in sapo("config", "--explain", "task.path").out


async def test_health_tells_scripts_and_people_the_same() -> None:
    lifecycle = Lifecycle()
    lifecycle.wait_for("redis", "Redis")
    async with serving(probe_app(lifecycle, ControlPlaneMetrics().registry), "127.0.0.1:0") as url:
        for_people = await asyncio.to_thread(sapo, "health", url)
        assert for_people.code == 8
        assert for_people.err.startswith(f"sapo: {url}: not ready: waits for ")
        for_scripts = await asyncio.to_thread(sapo, "health", url, "--json")
        assert (for_scripts.code, for_scripts.err) == (8, "")
        assert json.loads(for_scripts.out) == {"ready": False, "waiting_for": lifecycle.waiting_for}
        lifecycle.ready()
        lifecycle.ready("redis")
        assert await asyncio.to_thread(sapo, "health", url) == Outcome(0, "ready\n", "")
        for_scripts = await asyncio.to_thread(sapo, "health", url, "--json")
        assert json.loads(for_scripts.out) == {"ready": True, "waiting_for": []}


async def test_a_health_check_of_an_image_asks_the_address_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    lifecycle = Lifecycle()
    async with serving(probe_app(lifecycle, ControlPlaneMetrics().registry), "127.0.0.1:0") as url:
        monkeypatch.setenv("SAPO_HEALTH_ADDRESS", url)
        assert (await asyncio.to_thread(sapo, "health")).code == 8
        lifecycle.ready()
        assert await asyncio.to_thread(sapo, "health") == Outcome(0, "ready\n", "")


async def test_status_and_ledger_by_url(running: Running, learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPO_TOKEN", "the-run's-token")
    monkeypatch.setenv("COLUMNS", "20")
    assert (
        "no rollout worker is heard of: everybody waits for one"
        in (await asyncio.to_thread(sapo, "status", running.url)).out.splitlines()
    )
    await running.client.lease(lease_request("a"))
    note = "no response to the first 32 prompts is correct; for example [/b] '1+1=' was answered '[red]3'"
    await running.client.heartbeat(heartbeat("a", waiting_for="lookahead", notes=[note]))
    answer = json.loads((await asyncio.to_thread(sapo, "status", running.url, "--json")).out)
    assert answer["workers"][0]["notes"] == [note]
    lines = (await asyncio.to_thread(sapo, "status", running.url)).out.splitlines()
    assert f"note: {note}" in lines
    assert any(re.match(r"draw 0 \(attempt 1\) has been with a for [\d.]+ s$", line) for line in lines)
    assert any(line.startswith("a: version 0") and line.endswith("waits for lookahead") for line in lines)
    assert "could not be scored" not in " ".join(lines)
    for worker, reasons, last in [
        ("a", {"timeout": 1}, "task [b], prompt train-3: no answer"),
        ("b", {"exception": 2, "timeout": 9}, "task [b], prompt train-17: ZeroDivisionError"),
        ("a", None, ""),
    ]:
        unscored = reasons and {"reasons": reasons, "last": last}
        await running.client.heartbeat(heartbeat(worker, unscored=unscored))
    lines = (await asyncio.to_thread(sapo, "status", running.url)).out.splitlines()
    said = (
        "note: 12 responses could not be scored (timeout 10, exception 2); last: task [b], prompt train-17: "
        "ZeroDivisionError; the log of b says more"
    )
    assert said in lines
    (running.config.run.directory / "run.yaml").write_text(dump_config(running.config))
    assert said in (await asyncio.to_thread(sapo, "status", str(running.config.run.directory))).out.splitlines()
    ledger = await asyncio.to_thread(sapo, "ledger", running.url, "--json")
    assert (ledger.code, json.loads(ledger.out)["balanced"]) == (0, True)
    await learner.report("training", 1, cursor=5)
    ledger = await asyncio.to_thread(sapo, "ledger", running.url)
    assert ledger.code == 1
    assert "    balanced  False" in ledger.out


def test_figures_that_are_no_numbers_are_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json({"a": [float("nan"), (float("inf"), 1.5)], "b": {"c": None}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, [None, 1.5]], "b": {"c": None}}


# ---- The process itself


def test_the_entry_point_prints_one_line_and_exits_with_its_code(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "services.cli", "up", str(tmp_path / "none.yaml")], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr == f"sapo: {tmp_path}/none.yaml: no such file (`sapo config` prints a complete example)\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_full_disk_behind_standard_output_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "services.cli", "config", "--explain", ""],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert result.returncode == 1
    assert "No space left on device (make room on the disk" in result.stderr
    assert result.stderr.count("\n") == 1


def test_control_plane_ingest_and_command_line_start_without_torch() -> None:
    modules = "services.cli, services.control_plane.service, services.ingest.service, services.up, services.view"
    program = f"import sys, json\nimport {modules}\nprint(json.dumps([m for m in sys.modules if m in {{'torch'}}]))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []
