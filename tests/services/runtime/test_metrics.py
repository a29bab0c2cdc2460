"""What Prometheus gets of each process: everything that is defined, from the start, and of a bounded size."""

import math
from collections import Counter as Counted
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sapo_learner.diagnostics import AGE_EDGES, _age_name
from sapo_learner.ledger import Outcome
from sapo_learner.phases import BESIDE, OTHER, UPDATE
from services.runtime import metric_definitions as definitions
from services.runtime.disk_usage import DiskUsage, disk_usage
from services.runtime.metric_definitions import MAX_DIAGNOSTICS, MAX_VALUES, METRICS
from services.runtime.metric_registry import Metrics
from services.runtime.metric_table import document
from services.runtime.metrics import OF_TOKENS, ControlPlaneMetrics, IngestMetrics, LearnerMetrics, RolloutMetrics
from tests.documents import ROOT
from tests.prometheus import check_metrics

PROCESSES: list[type[Metrics]] = [ControlPlaneMetrics, IngestMetrics, LearnerMetrics, RolloutMetrics]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda each: each.service)


def line(**fields: Any) -> dict[str, Any]:
    zero = dict.fromkeys(
        ("tokens", "reward", "policy_age_mean", "policy_age_max", "started", "ended", "waited_seconds",
         "gradient_norm", "entropy"), 0.0,
    )  # fmt: skip
    costs = {"seconds": {"forward": 0.5, "read": 2.0}, "memory_bytes": {"forward": 7}, "flops_per_second": 1e9}
    return {"step": 1, "outcomes": {}, "diagnostics": {}, "rewards": {}, **zero, **costs, **fields}


def status(**fields: Any) -> dict[str, Any]:
    zero = dict.fromkeys(
        ("version", "published_step", "steps", "oldest_lease_seconds", "accepted", "unread", "unread_bytes",
         "redis_memory_bytes", "groups_ready", "open_leases", "overdue_leases", "reoffered"), 0,
    )  # fmt: skip
    return {"learner": {"step": 0}, "evaluations": [], "workers": [], **zero, **fields}


def worker(name: str, **fields: Any) -> dict[str, Any]:
    return {"worker": name, "version": 3, "step": 6, "tokens_per_second": 100.0, "age_seconds": 0.5, **fields}


def observe(metrics: ControlPlaneMetrics, *, ledger: dict[str, Any] | None = None, **fields: Any) -> None:
    metrics.observe(status(**fields), ledger or {"problems": []}, DiskUsage(7, 11.0))


def series(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """Label values -> value."""
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    found = [each for family in families for each in family.samples if each.name == name]
    return {tuple(each.labels.values()): each.value for each in found}


# ---- Everything that is defined is there


@every_process
def test_every_metric_and_every_known_label_value_is_there_from_the_start(process: type[Metrics]) -> None:
    metrics = process()
    for each in METRICS[process.service]:
        name = each.name if each.kind != "histogram" else f"{each.name}_count"
        known = [values for values in each.labels.values() if not isinstance(values, str)]
        wanted = math.prod(map(len, known)) if len(known) == len(each.labels) else 0
        assert len(series(metrics, name)) == wanted, each.name


def names() -> Iterator[str]:
    return (each.name for metrics in METRICS.values() for each in metrics)


def test_a_name_is_one_process_s_or_everybody_s_and_all_follow_the_conventions() -> None:
    count = Counted(names())
    assert {name for name, times in count.items() if times > 1} == {"sapo_unusable_secret_files"}
    assert count["sapo_unusable_secret_files"] == len(METRICS)
    for each in [each for metrics in METRICS.values() for each in metrics]:
        assert each.name.startswith("sapo_")
        assert each.name.endswith("_total") == (each.kind == "counter")
        assert bool(each.buckets) == (each.kind == "histogram")
        if each.unit in ("seconds", "bytes"):
            assert each.unit in each.name


@every_process
def test_promtool_finds_nothing_to_say(process: type[Metrics]) -> None:
    check_metrics(generate_latest(process().registry).decode())


def test_a_library_s_metrics_stand_beside_ours_and_no_other_does() -> None:
    metrics, theirs, other = RolloutMetrics(), Counter("vllm:requests", "Theirs"), Counter("someone", "Else")
    try:
        theirs.inc(3)
        assert "vllm:requests" not in generate_latest(metrics.registry).decode()
        metrics.include("vllm:")
        text = generate_latest(metrics.registry).decode()
    finally:
        REGISTRY.unregister(theirs)
        REGISTRY.unregister(other)
    assert "\nvllm:requests_total 3.0\n" in text
    assert "\nsapo_rollout_tokens_total 0.0\n" in text
    assert "someone" not in text
    assert text.count("# TYPE python_info gauge") == 1


def test_known_label_values_are_those_of_the_parts_that_they_speak_of() -> None:
    assert set(definitions.OUTCOMES) == set(Outcome)
    ages = [_age_name(first, beyond) for first, beyond in zip(AGE_EDGES, [*AGE_EDGES[1:], math.inf], strict=True)]
    assert ("all", "positive", "negative", *ages) == definitions.GROUPS
    assert {*UPDATE, *BESIDE, OTHER} < set(definitions.PHASES)
    grant = (ROOT / "services/runstore/scripts/grant.lua").read_text()
    for reason in definitions.WAITS:
        assert f"'{reason}'" in grant or reason == "lease"


def test_the_document_is_made_from_the_definitions() -> None:
    made = "python -m services.runtime.metric_table > docs/metrics.md"
    assert (ROOT / "docs" / "metrics.md").read_text() == document(), f"make it again: {made}"


# ---- The learner


def test_each_phase_is_a_label() -> None:
    metrics = LearnerMetrics()
    metrics.observe(line())
    metrics.observe(line())
    value = metrics.registry.get_sample_value
    assert value("sapo_learner_phase_seconds_sum", {"phase": "forward"}) == 1.0
    assert value("sapo_learner_phase_seconds_count", {"phase": "read"}) == 2
    assert value("sapo_learner_phase_memory_bytes", {"phase": "forward"}) == 7


def test_what_is_not_known_is_no_zero() -> None:
    metrics = LearnerMetrics()
    value = metrics.registry.get_sample_value
    assert math.isnan(value("sapo_learner_reward") or 0.0)
    metrics.observe(line())
    assert value("sapo_learner_flops_per_second") == 1e9
    assert math.isnan(value("sapo_learner_mfu") or 0.0)
    metrics.observe(line(flops_per_second=None, mfu=0.25))
    assert math.isnan(value("sapo_learner_flops_per_second") or 0.0)
    assert value("sapo_learner_mfu") == 0.25


def test_diagnostics_of_every_objective_are_metrics_of_their_own_by_group_of_tokens() -> None:
    metrics = LearnerMetrics()
    figures = {name: {"positive": 0.5, "age_2": 0.25} for name in OF_TOKENS}
    metrics.observe(line(diagnostics={**figures, "clipped": {"all": 0.125}}))
    for metric in OF_TOKENS.values():
        found = series(metrics, metric)
        assert (found["positive",], found["age_2",]) == (0.5, 0.25)
        assert math.isnan(found["negative",])
    assert series(metrics, "sapo_objective_diagnostic") == {("all", "clipped"): 0.125}
    metrics.observe(line())
    assert math.isnan(series(metrics, "sapo_learner_gate_weight")["positive",]), "no token of that group in this step"


def test_names_that_others_decide_do_not_add_up() -> None:
    metrics = LearnerMetrics()
    for step in range(10):
        rewards = {f"component-{step}-{number}": 1.0 for number in range(100)}
        hostile = {"x" * 10_000: 1.0, "new\nline": 1.0, "half \ud800": 1.0}
        diagnostics = {name: {"all": 1.0} for name in rewards}
        metrics.observe(line(rewards={"correct": float(step), **hostile, **rewards}, diagnostics=diagnostics))
    assert len(series(metrics, "sapo_learner_reward_component")) <= MAX_VALUES + 1
    assert len(series(metrics, "sapo_objective_diagnostic")) <= MAX_DIAGNOSTICS + 1
    assert series(metrics, "sapo_learner_reward_component")["correct",] == 9.0
    assert ("other",) in series(metrics, "sapo_learner_reward_component")
    assert len(generate_latest(metrics.registry)) < 100_000


def test_waiting_counts_while_it_goes_on() -> None:
    metrics = LearnerMetrics()
    for seconds, counted in ((1.5, 1.5), (4.0, 4.0), (3.9, 4.0), (4.5, 4.5)):
        metrics.waited(seconds)
        assert series(metrics, "sapo_learner_waiting_seconds_total") == {(): counted}


def test_a_checkpoint_s_time_is_that_of_the_newest() -> None:
    metrics = LearnerMetrics()
    assert series(metrics, "sapo_checkpoint_timestamp_seconds") == {(): 0}
    metrics.at(3, 0)
    (first,) = series(metrics, "sapo_checkpoint_timestamp_seconds").values()
    metrics.at(4, 0)
    assert list(series(metrics, "sapo_checkpoint_timestamp_seconds").values()) == [first]
    assert series(metrics, "sapo_learner_step") == {(): 4}
    metrics.at(5, 5)
    assert series(metrics, "sapo_checkpoint_step") == {(): 5}
    (last,) = series(metrics, "sapo_checkpoint_timestamp_seconds").values()
    assert last > first > 0


def test_disk_is_what_the_files_of_a_directory_take(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "one").write_bytes(bytes(1000))
    (tmp_path / "two").write_bytes(bytes(24))
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    found = disk_usage(tmp_path)
    assert 1024 <= found.used_bytes < 2048
    assert found.free_bytes > 0
    nothing = disk_usage(tmp_path / "not there")
    assert nothing.used_bytes == 0
    assert math.isnan(nothing.free_bytes)


# ---- The control plane


def test_a_worker_has_series_while_it_is_alive() -> None:
    metrics = ControlPlaneMetrics()
    observe(metrics, workers=[worker("a"), worker("b", version=5, step=10)], published_step=10)
    assert series(metrics, "sapo_worker_policy_version") == {("a",): 3, ("b",): 5}
    assert series(metrics, "sapo_worker_policy_lag_steps") == {("a",): 4, ("b",): 0}
    observe(metrics, workers=[worker("b")])
    for name in ("policy_version", "policy_lag_steps", "tokens_per_second", "heartbeat_age_seconds"):
        assert list(series(metrics, f"sapo_worker_{name}")) == [("b",)]


def test_workers_without_number_have_no_series_without_number() -> None:
    metrics = ControlPlaneMetrics()
    for generation in range(3):
        observe(metrics, workers=[worker(f"{generation}-{number}") for number in range(1000)])
    assert series(metrics, "sapo_workers") == {(): 1000}
    assert len(series(metrics, "sapo_worker_policy_version")) == MAX_VALUES


def test_the_ledger_by_outcome_and_leases_by_state() -> None:
    metrics = ControlPlaneMetrics()
    ledger = {"trained": 5, "refused": 2, "backlog": 3, "uncounted": 9, "problems": ["a", "b"]}
    observe(metrics, ledger=ledger, open_leases=4, overdue_leases=1, reoffered=2)
    found = series(metrics, "sapo_ledger_groups")
    assert (found["trained",], found["refused",], found["backlog",], found["stale",]) == (5, 2, 3, 0)
    assert set(found) == {(each,) for each in [*Outcome, "backlog"]}
    assert series(metrics, "sapo_ledger_problems") == {(): 2}
    assert series(metrics, "sapo_leases") == {("open",): 3, ("overdue",): 1, ("reoffered",): 2}


def test_before_the_first_evaluation_there_is_no_pass_at_1() -> None:
    metrics = ControlPlaneMetrics()
    observe(metrics)
    assert math.isnan(series(metrics, "sapo_evaluation_pass_at_1")[()])
    observe(metrics, evaluations=[{"pass_at_1": 0.5, "step": 0}, {"pass_at_1": 0.75, "step": 20}])
    assert series(metrics, "sapo_evaluation_pass_at_1") == {(): 0.75}
    assert series(metrics, "sapo_evaluation_step") == {(): 20}
