"""The same figures for every objective, against sums written out, and the lever that a warning names."""

import math

import numpy as np
import pytest
import torch

from sapo_learner import diagnostics
from sapo_learner.diagnostics import advice, coefficients
from sapo_learner.objectives import Tokens, available, build


def tokens(z: list[float], advantages: list[float], ages: list[int], mask: list[bool] | None = None) -> Tokens:
    return Tokens(
        logprobs=(torch.tensor(z, dtype=torch.float64) - 1).requires_grad_(),
        behaviour_logprobs=torch.full((len(z),), -1.0, dtype=torch.float64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        loss_mask=torch.tensor(mask or [True] * len(z)),
        sequence_ids=torch.arange(len(z)),
        entropy=torch.ones(len(z), dtype=torch.float64),
        policy_age=torch.tensor(ages),
    )


def summary(objective: str, *microbatches: Tokens) -> dict[str, dict[str, float]]:
    parts = [
        {name: values.detach()[each.loss_mask].double().numpy() for name, values in columns.items()}
        for each in microbatches
        for columns in [diagnostics.columns(each, build(objective)(each))]
    ]
    return diagnostics.summary({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def test_figures_are_sums_over_the_tokens_that_the_loss_sees() -> None:
    z, masked = [0.0, 0.5, -0.7, 30.0], 9.0
    given = tokens([*z, masked], [1.0, 1.0, -2.0, -1.0, 1.0], [0, 1, 1, 4, 0], [True] * 4 + [False])
    found = summary("sapo", given)
    ratios = [math.exp(min(each, 20.0)) for each in z]
    gates = [1 / math.cosh(min(tau * (r - 1) / 2, 300)) ** 2 for r, tau in zip(ratios, [1, 1, 1.05, 1.05], strict=True)]
    weights = [r * w for r, w in zip(ratios[:3], gates[:3], strict=True)] + [0.0]
    assert found["coefficient"]["all"] == pytest.approx(sum(weights) / 4, abs=1e-12)
    assert found["gate"]["all"] == pytest.approx(sum(gates) / 4, abs=1e-12)
    assert found["gate_below_half"]["all"] == 1 / 4
    assert found["clamped"] == {"all": 1 / 4, "positive": 0, "negative": 1 / 2, "age_0": 0, "age_1": 0, "age_3_4": 1}
    assert found["effective_sample_size"]["all"] == pytest.approx(
        sum(weights) ** 2 / (4 * sum(w * w for w in weights)), abs=1e-12
    )
    assert found["kl"]["age_1"] == pytest.approx(sum(math.exp(x) - 1 - x for x in z[1:3]) / 2, abs=1e-12)
    assert found["log_ratio_std"]["age_1"] == pytest.approx(np.std(z[1:3]), abs=1e-12)
    assert found["log_ratio"]["age_1"] == pytest.approx((0.5 - 0.7) / 2, abs=1e-12)
    assert found["importance_ratio"]["positive"] == pytest.approx(sum(ratios[:2]) / 2, abs=1e-12)


@pytest.mark.parametrize("objective", available())
def test_every_objective_is_reported_the_same_way(objective: str) -> None:
    found = summary(objective, tokens([0.1, -0.2, 0.3], [1.0, -1.0, 0.5], [0, 2, 40]))
    assert found.keys() >= {"log_ratio_std", "kl", "clamped", "coefficient", "coefficient_p50", "effective_sample_size"}
    for groups in found.values():
        assert groups.keys() == {"all", "positive", "negative", "age_0", "age_2", "age_33_on"}
        assert all(math.isfinite(value) for value in groups.values())


@pytest.mark.parametrize("objective", ["sapo", "grpo"])
def test_on_policy_every_token_counts_fully(objective: str) -> None:
    found = summary(objective, tokens([0.0, 0.0], [1.0, -0.5], [0, 0]))
    assert found["coefficient"]["all"] == found["effective_sample_size"]["all"] == 1
    assert found["kl"]["all"] == found["log_ratio_std"]["all"] == 0


def test_splitting_a_step_changes_nothing() -> None:
    z, advantages, ages = [0.1, -0.4, 0.9, 0.2], [1.0, -1.0, 0.5, 2.0], [0, 1, 5, 2]
    whole = summary("sapo", tokens(z, advantages, ages))
    parts = [tokens(z[i : i + 1], advantages[i : i + 1], ages[i : i + 1]) for i in range(4)]
    assert summary("sapo", *parts) == {name: pytest.approx(groups, abs=1e-12) for name, groups in whole.items()}


def test_the_coefficient_is_zero_without_signal_and_leaves_the_graph_alone() -> None:
    given = tokens([0.5, 0.5], [0.0, 1.0], [0, 0])
    surrogate = build("sapo")(given)
    assert coefficients(given, surrogate)[0] == 0
    surrogate.loss.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("spreads", "lever"),
    [
        ({"age_0": 0.1, "age_1": 0.2}, None),
        ({"age_0": 0.3, "age_1": 0.1}, "sapo check"),
        ({"age_0": 0.1, "age_1": 0.3, "age_2": 0.5}, "optimizer.learning_rate"),
        ({"age_0": 0.1, "age_1": 0.2, "age_3_4": 0.4}, "pacing.lookahead"),
        ({"all": 0.9}, None),
    ],
)
def test_a_wide_spread_names_the_lever_to_pull_first(spreads: dict[str, float], lever: str | None) -> None:
    said = advice({"log_ratio_std": spreads}, 0.25)
    assert (said is None) if lever is None else (lever in (said or ""))
