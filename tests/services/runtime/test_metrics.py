"""What Prometheus gets of a step's line."""

import math
from typing import Any

from services.runtime.metrics import LearnerMetrics


def line(**fields: Any) -> dict[str, Any]:
    zero = dict.fromkeys(
        ("tokens", "reward", "policy_age_mean", "started", "ended", "waited_seconds", "gradient_norm", "entropy",
         "log_ratio_std"), 0.0,
    )  # fmt: skip
    costs = {"seconds": {"forward": 0.5, "read": 2.0}, "memory_bytes": {"forward": 7}, "flops_per_second": 1e9}
    return {"step": 1, "outcomes": {}, "diagnostics": {}, **zero, **costs, **fields}


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
    metrics.observe(line())
    assert value("sapo_learner_flops_per_second") == 1e9
    assert math.isnan(value("sapo_learner_mfu") or 0.0)
    metrics.observe(line(flops_per_second=None, mfu=0.25))
    assert math.isnan(value("sapo_learner_flops_per_second") or 0.0)
    assert value("sapo_learner_mfu") == 0.25
