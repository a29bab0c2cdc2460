"""Rules and dashboard by themselves; what of them a real run gives is in tests/end_to_end/test_stack.py."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.prometheus_targets import TARGETS_FILE, write_targets
from services.runtime.metric_definitions import METRICS
from tests.documents import ROOT
from tests.prometheus import (
    DASHBOARD,
    RULES,
    Expression,
    everything,
    of_dashboard,
    of_rules,
    promtool,
    rules,
)

ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
TESTS = RULES / "tests" / "alerts.test.yml"


def run_promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [promtool(), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """deploy/prometheus, to be changed."""
    return Path(shutil.copytree(RULES, tmp_path / "prometheus"))


# ---- Rules


def test_promtool_finds_nothing_wrong_with_configuration_and_rules() -> None:
    checked = run_promtool("check", "config", RULES / "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "FAILED" not in checked.stdout


def test_the_unit_tests_of_the_rules_pass() -> None:
    tested = run_promtool("test", "rules", TESTS)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("expression", ["vector(1)", "vector(1) > 2"], ids=["always", "never"])
def test_an_alert_that_always_or_never_fires_fails_its_unit_test(expression: str, copied: Path) -> None:
    path = copied / "alerts.rules.yml"
    path.write_text(yaml.safe_dump(_replaced(yaml.safe_load(path.read_text()), expression)))
    tested = run_promtool("test", "rules", copied / "tests" / TESTS.name)
    assert set(re.findall(r"alertname: (\w+),", tested.stdout + tested.stderr)) == set(ALERTS)


def _replaced(content: dict[str, Any], expression: str) -> dict[str, Any]:
    for rule in [rule for group in content["groups"] for rule in group["rules"]]:
        rule["expr"] = expression
    return content


def test_alerts_are_those_that_the_documents_explain_each_with_what_to_do() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    assert set(re.findall(r"^### (Sapo\w+)$", text, re.MULTILINE)) == set(ALERTS)
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert "$value" in rule["annotations"]["description"]
        assert rule["annotations"]["runbook"] == f"docs/monitoring.md#{name.lower()}"


# ---- Names


def defined() -> set[str]:
    """Names of series: a histogram has three."""
    found = {rule["record"] for rule in rules() if "record" in rule}
    for metric in [each for metrics in METRICS.values() for each in metrics]:
        suffixes = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        found |= {metric.name + suffix for suffix in suffixes}
    return found


def undefined(asked: list[Expression]) -> list[str]:
    names = {(each.where, selector.partition("{")[0]) for each in asked for selector in each.selectors}
    return [f"{where}: {name}" for where, name in sorted(names) if not {name, f"{name}_count"} & defined()]


def test_rules_dashboard_and_documents_name_only_what_is_defined() -> None:
    assert undefined(everything()) == []


def test_a_misspelt_name_is_found(copied: Path) -> None:
    path = copied / "alerts.rules.yml"
    path.write_text(path.read_text().replace("sapo_workers)", "sapo_worker)"))
    assert undefined(of_rules(copied)) == ["SapoNoWorkers: sapo_worker"]


def test_every_metric_is_read_by_a_rule_or_a_panel() -> None:
    read = {selector.partition("{")[0] for each in of_rules() + of_dashboard() for selector in each.selectors}
    for metric in [each for metrics in METRICS.values() for each in metrics]:
        assert {metric.name, f"{metric.name}_sum", f"{metric.name}_bucket"} & read, metric.name


# ---- The dashboard


def test_the_dashboard_s_rows_are_the_questions_of_the_pictures_in_their_order() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = re.findall(r"^## (.+\?) ", (ROOT / "docs" / "seeing.md").read_text(), re.MULTILINE)
    assert [each["title"] for each in panels if each["type"] == "row"] == asked


def test_no_two_panels_share_a_place_a_number_or_a_name() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    taken: set[tuple[int, int]] = set()
    for each in panels:
        x, y, w, h = (each["gridPos"][side] for side in "xywh")
        place = {(column, line) for column in range(x, x + w) for line in range(y, y + h)}
        assert x + w <= 24
        assert not place & taken, each["title"]
        taken |= place
    for key in ("id", "title"):
        assert len({each[key] for each in panels}) == len(panels)


# ---- Where `sapo up` says that its processes are


def test_prometheus_takes_the_targets_that_a_run_writes(copied: Path, tmp_path: Path) -> None:
    write_targets(tmp_path, "demo", {"control-plane": "127.0.0.1:1", "rollout-7": "127.0.0.1:2"})
    link = copied / "targets" / "demo.json"
    link.symlink_to(tmp_path / TARGETS_FILE)
    assert json.loads(link.read_text()) == [
        {"targets": ["127.0.0.1:1"], "labels": {"run": "demo", "service": "control-plane", "process": "control-plane"}},
        {"targets": ["127.0.0.1:2"], "labels": {"run": "demo", "service": "rollout", "process": "rollout-7"}},
    ]
    checked = run_promtool("check", "config", copied / "prometheus.yml")
    assert (checked.returncode, "WARNING" in checked.stdout) == (0, False), checked.stdout
    write_targets(tmp_path, "demo", {})
    assert json.loads(link.read_text()) == []


def test_targets_that_cannot_be_written_are_said_and_end_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_targets(tmp_path / "not there", "demo", {"learner": "127.0.0.1:1"})
    assert "may look for the processes in the wrong place" in caplog.text
