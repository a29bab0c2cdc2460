"""The sizing table follows from its own figures, and its measurements still run."""

import argparse
import re
from dataclasses import replace

import pytest

from benchmarks.sizing import RESULTS, chosen
from benchmarks.sizing_cases import SHAPES, Bytes, Sizing
from benchmarks.sizing_measured import groups, log_bytes
from benchmarks.sizing_report import report
from tests.documents import ROOT

TEXT = (RESULTS / "sizing.md").read_text()
SHAPE_ROWS = tuple(f"| {each.name} |" for each in SHAPES)
NOTHING = argparse.Namespace(
    rollout_tokens=None, response_tokens=None, groups_per_step=None, workers=None, max_policy_age=None
)


def measured() -> Bytes:
    """As results/sizing.md says it."""
    figures = re.findall(r"^\| .* \| .* \| ([\d.]+)( MB)? (?:bytes per|per second)", TEXT, re.MULTILINE)
    return Bytes(*(float(number) * (1e6 if unit else 1) for number, unit in figures))


def tables(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_report_is_what_the_arithmetic_makes_of_its_figures() -> None:
    sizings = [Sizing(shape, measured()) for shape in chosen(NOTHING)]
    assert tables(report(sizings, command="")) == tables(TEXT)


def test_the_page_about_deploying_has_the_same_tables() -> None:
    shown = [line for line in tables((ROOT / "docs" / "deploy.md").read_text()) if line.startswith(SHAPE_ROWS)]
    assert shown
    assert shown == [line for line in tables(TEXT.partition("## Traffic")[2]) if line.startswith(SHAPE_ROWS)]


def test_sizes_follow_from_their_parts() -> None:
    plain = Bytes(wire=10, redis=12, archive=6, snapshot=2, checkpoint=12, manifest=100, upload=1e9, download=1e9)
    shape = replace(
        SHAPES[2], parameters=1e9, active=1e9, tensors=10, learner_gpus=8, workers=3, gpus_per_worker=2,
        rollout_tokens=1000, response_tokens=100, groups_per_step=10, group_size=10, max_policy_age=4,
    )  # fmt: skip
    found = Sizing(shape, plain)
    assert found.tokens_per_second == 6000  # of the workers, who are slower than the learner
    assert found.step_seconds == pytest.approx(10_000 / 6000)
    assert found.publish_seconds == 2 + 3 * 2
    assert found.publish_every == 5
    assert found.control_plane_rate == pytest.approx(4 * 2e9 / (5 * found.step_seconds))
    assert found.object_storage_rate == pytest.approx(4 * 1000 / (5 * found.step_seconds))
    assert found.redis_most == 5 * 10_000 * 12
    assert found.snapshots == 7 * 2e9
    assert found.learner_disk == 5 * 12e9 + 2 * 2e9
    slow_learner = replace(shape, learner_gpus=0.1, rollout_tokens=1e9)
    assert Sizing(slow_learner, plain).tokens_per_second == pytest.approx(0.1 * 0.25 * 989e12 / 6e9)


def test_a_token_costs_its_id_its_log_prob_and_little_more() -> None:
    found = log_bytes(groups(64, 1000, 4))
    assert 8 < found.wire < 16
    assert found.wire < found.redis < 4 * found.wire
    assert 4 < found.archive < found.wire
