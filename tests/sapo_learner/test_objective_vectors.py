"""Objectives against vectors/sapo.json: numbers computed elsewhere, by closed form, autograd and finite differences.

The file holds the paper's uncentred SAPO value -f A. Ours is centred, -(f - 2/tau) A, so (2/tau) A is taken off again,
per token, before comparing. Gradients are the same.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sapo_learner.advantages import group_advantages
from sapo_learner.aggregation import Mode, token_weights
from sapo_learner.config import AdvantageSettings
from sapo_learner.objectives import Tokens, build

torch.set_num_threads(1)
VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "sapo.json").read_text())
TOLERANCE = {"float64_abs": 1e-12, "float32_rel": 2e-6}
TAU = {"pos": 1.0, "neg": 1.05}


def tokens_of(
    new: list[float], old: list[float], advantages: list[float], dtype: torch.dtype = torch.float64
) -> Tokens:
    """Each token a response of its own."""
    return Tokens(
        logprobs=torch.tensor(new, dtype=dtype).requires_grad_(),
        behaviour_logprobs=torch.tensor(old, dtype=dtype),
        advantages=torch.tensor(advantages, dtype=dtype),
        loss_mask=torch.ones(len(new), dtype=torch.bool),
        sequence_ids=torch.arange(len(new)),
    )


def sapo_at(row: dict[str, Any], new: float, old: float, dtype: torch.dtype) -> tuple[float, float, float]:
    """Uncentred loss, gate and gradient of one token at the row's tau and advantage."""
    a = row["advantage"]
    tokens = tokens_of([new], [old], [a], dtype)
    option = "tau_pos" if a > 0 else "tau_neg"
    surrogate = build("sapo", **{option: row["tau"]})(tokens)
    (gradient,) = torch.autograd.grad(surrogate.loss.sum(), tokens.logprobs)
    uncentred = surrogate.loss.item() - 2 / row["tau"] * a
    return uncentred, surrogate.diagnostics["gate"].item(), gradient.item()


def close(value: float, dtype: torch.dtype) -> Any:
    if dtype == torch.float64:
        return pytest.approx(value, abs=TOLERANCE["float64_abs"], rel=0)
    # Or four rounding steps at 1: a nearly closed gate is a difference of numbers close to 1 (r = 6.7 below).
    return pytest.approx(value, rel=TOLERANCE["float32_rel"], abs=4 * 2**-23)


both = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def test_defaults_are_the_papers() -> None:
    defaults = build("sapo").model_dump()
    assert (defaults["tau_pos"], defaults["tau_neg"]) == (TAU["pos"], TAU["neg"])


@both
def test_grid(dtype: torch.dtype) -> None:
    assert len(VECTORS["grid"]) == 48
    for row in VECTORS["grid"]:
        loss, gate, gradient = sapo_at(row, row["log_ratio"], 0.0, dtype)
        assert loss == close(row["loss"], dtype), row
        assert gate == close(row["df_dr"], dtype), row
        assert gradient == close(row["dloss_dlogp"], dtype), row
        assert -loss / row["advantage"] == close(row["f"], dtype), row
        assert gradient == pytest.approx(row["dloss_dlogp_finite_diff"], abs=1e-6), row


@both
def test_async_variants_behaviour_anchored(dtype: torch.dtype) -> None:
    for row in VECTORS["async_variants"]:
        loss, _, gradient = sapo_at(row, row["logp_new"], row["logp_behaviour"], dtype)
        assert loss == close(row["behaviour_anchored"]["loss"], dtype), row
        assert gradient == close(row["behaviour_anchored"]["grad"], dtype), row
        tokens = tokens_of([row["logp_new"]], [row["logp_behaviour"]], [1.0])
        assert tokens.log_ratio.exp().item() == close(row["behaviour_anchored"]["ratio"], torch.float64)


def test_peak_of_the_gradient() -> None:
    for tau, peak in VECTORS["wr_peak"].items():
        ratios = [peak["r"] - 1e-3, peak["r"], peak["r"] + 1e-3]
        tokens = tokens_of([math.log(r) for r in ratios], [0.0] * 3, [1.0] * 3)
        loss = build("sapo", tau_pos=float(tau))(tokens).loss.sum()
        before, at, after = (-torch.autograd.grad(loss, tokens.logprobs)[0]).tolist()
        assert at == close(peak["value"], torch.float64)
        assert max(before, after) < at


def test_half_weight() -> None:
    for tau in (2.0, 5.0):
        d = VECTORS["half_weight_abs_u"] / tau
        tokens = tokens_of([math.log1p(d), math.log1p(-d)], [0.0] * 2, [1.0] * 2)
        gate = build("sapo", tau_pos=tau)(tokens).diagnostics["gate"]
        assert gate.tolist() == [close(0.5, torch.float64)] * 2


def test_low_side_floor() -> None:
    """r = 0 cannot be reached: the log ratio stops at -20, where r = 2e-9 moves both numbers by less than that."""
    for tau, floor in VECTORS["identities"]["low_side_floor_w0"].items():
        gate = build("sapo", tau_pos=float(tau))(tokens_of([-99.0], [0.0], [1.0])).diagnostics["gate"]
        assert gate.item() == pytest.approx(floor, abs=2.1e-9)
    for tau, f in VECTORS["identities"]["f_at_r0"].items():
        loss = build("sapo", tau_pos=float(tau))(tokens_of([-99.0], [0.0], [1.0])).loss
        assert 2 / float(tau) - loss.item() == pytest.approx(f, abs=2.1e-9)


def test_centred_value_is_the_tanh_identity() -> None:
    for row in VECTORS["grid"]:
        tau, u = row["tau"], row["tau"] * (row["ratio"] - 1) / 2
        slack = 2 * VECTORS["identities"]["max_err"]["tanh"]
        assert row["f"] - 2 / tau == pytest.approx(2 / tau * math.tanh(u), abs=slack)


# ---- The batch of three responses ----------------------------------------------------------------------------------

BATCH = VECTORS["batch_example"]
LOSSES = BATCH["losses"]
# name in the file: objective, its options, aggregation, its length
RECIPES: dict[str, tuple[str, dict[str, float], Mode, int | None]] = {
    "sapo": ("sapo", {}, "sequence_mean", None),
    "sapo_tokenmean": ("sapo", {}, "token_mean", None),
    "grpo_eps0.2": ("grpo", {"clip_low": 0.2, "clip_high": 0.2}, "sequence_mean", None),
    "dapo_0.2_0.28": ("grpo", {"clip_low": 0.2, "clip_high": 0.28}, "token_mean", None),
    "dr_grpo_max4": ("grpo", {"clip_low": 0.2, "clip_high": 0.2}, "constant", 4),
    "gspo_wide_0.2": ("gspo", {"clip_low": 0.2, "clip_high": 0.2}, "sequence_mean", None),
    "gspo_token_wide_0.2": ("gspo", {"clip_low": 0.2, "clip_high": 0.2}, "sequence_mean", None),
    "gspo_paper_3e-4_4e-4": ("gspo", {}, "sequence_mean", None),
}


def batch_tokens(dtype: torch.dtype, new: str = "logp_new") -> Tokens:
    """The padded [3, 4] example, flattened; padding stays, masked."""
    flat = {key: torch.tensor(BATCH[key]).flatten() for key in ("logp_new", "logp_behaviour", "mask")}
    mask = flat["mask"].bool()
    exact = {key: torch.tensor(BATCH[key], dtype=torch.float64).flatten() for key in ("logp_new", "logp_behaviour")}
    return Tokens(
        logprobs=exact[new].to(dtype).requires_grad_(),
        behaviour_logprobs=exact["logp_behaviour"].to(dtype),
        advantages=torch.tensor(BATCH["adv_population_std"], dtype=torch.float64).repeat_interleave(4),
        loss_mask=mask,
        sequence_ids=torch.tensor([11, 5, 8]).repeat_interleave(4),
    )


def uncentring(tokens: Tokens) -> Tensor:
    """(2/tau) A per token, what the paper's value has on top of ours."""
    a = tokens.masked_advantages
    return 2 / torch.where(a > 0, torch.full_like(a, TAU["pos"]), TAU["neg"]) * a


@both
@pytest.mark.parametrize("key", RECIPES)
def test_batch_example(key: str, dtype: torch.dtype) -> None:
    name, options, mode, length = RECIPES[key]
    tokens = batch_tokens(dtype)
    weights = token_weights(tokens, mode, length=length)
    loss = build(name, **options)(tokens).loss
    (gradient,) = torch.autograd.grad((weights * loss).sum(), tokens.logprobs)
    value = (weights * (loss - uncentring(tokens) if name == "sapo" else loss)).sum().item()
    # The value is a sum that nearly cancels: in float32 its error is relative to its terms, which are of order 1.
    assert value == pytest.approx(LOSSES[key]["loss"], rel=0, abs=1e-12 if dtype == torch.float64 else 1e-6)
    expected = torch.tensor(LOSSES[key]["grad"], dtype=dtype).flatten()
    rtol, atol = (0.0, 1e-12) if dtype == torch.float64 else (2e-6, 0.0)
    torch.testing.assert_close(gradient, expected, rtol=rtol, atol=atol)


def test_on_policy_all_objectives_agree() -> None:
    """identities.on_policy_equivalence_max_diff: nothing at all between SAPO, GRPO and REINFORCE, nor GSPO."""
    allowed = VECTORS["identities"]["on_policy_equivalence_max_diff"]
    tokens = batch_tokens(torch.float64, new="logp_behaviour")
    weights = token_weights(tokens, "sequence_mean")
    reinforce = -weights * tokens.masked_advantages
    for name in ("sapo", "grpo", "gspo"):
        (gradient,) = torch.autograd.grad((weights * build(name)(tokens).loss).sum(), tokens.logprobs)
        limit = allowed[f"{name}_vs_reinforce"] if name != "grpo" else allowed["sapo_vs_grpo"]
        assert (gradient - reinforce).abs().max() <= limit + 1e-16  # one rounding: ours multiplies in another order


def test_advantages_of_the_batch_example() -> None:
    rewards = torch.tensor(BATCH["rewards"], dtype=torch.float64).numpy()
    for std in ("population", "sample"):
        advantages = group_advantages(rewards, AdvantageSettings(std=std, eps=1e-15))
        assert advantages.tolist() == pytest.approx(BATCH[f"adv_{std}_std"], abs=1e-12)


# ---- From tokens to sequences: section 4 of the SAPO paper ---------------------------------------------------------


def test_reduction_of_a_response_with_an_outlier() -> None:
    """SAPO damps the one far token; GSPO drops all four."""
    row = VECTORS["sequence_reduction"]["outlier"]
    z = [math.log(r) for r in row["ratios"]]
    tokens = tokens_of(z, [0.0] * 4, [1.0] * 4)
    one_response = Tokens(**(vars(tokens) | {"sequence_ids": torch.zeros(4, dtype=torch.int64)}))
    gate = build("sapo", tau_pos=row["tau"])(one_response).diagnostics["gate"]
    assert gate.tolist() == [close(weight, torch.float64) for weight in row["token_weights"]]

    gspo = build("gspo")(one_response)
    assert gspo.diagnostics["ratio"].tolist() == [close(row["s"], torch.float64)] * 4
    assert gspo.diagnostics["clipped"].tolist() == [1.0] * 4
    assert torch.autograd.grad(gspo.loss.sum(), tokens.logprobs)[0].tolist() == [0.0] * 4

    mu, variance = sum(z) / 4, sum((each - sum(z) / 4) ** 2 for each in z) / 4
    mean_gate = sum(1 / math.cosh(row["tau"] * each / 2) ** 2 for each in z) / 4
    sequence_gate = 1 / math.cosh(row["tau"] * mu / 2) ** 2
    assert (mu, variance, mean_gate, sequence_gate) == pytest.approx(
        (row["mu"], row["var"], row["mean_gate_logspace"], row["seq_gate"]), abs=1e-12
    )
    assert abs(mean_gate - sequence_gate) == pytest.approx(row["D"], abs=1e-12)
    assert row["D"] <= row["bound"] == pytest.approx(row["tau"] ** 2 / 4 * variance, abs=1e-12)


def test_reduction_of_a_homogeneous_response() -> None:
    """Close to on-policy the mean coefficient w r of the tokens is the gate of the sequence, up to O(variance)."""
    row = VECTORS["sequence_reduction"]["homogeneous"]
    tokens = tokens_of(row["log_ratios"], [0.0] * 5, [1.0] * 5)
    diagnostics = build("sapo")(tokens).diagnostics
    mean = (diagnostics["gate"] * diagnostics["ratio"]).mean().item()
    assert mean == close(row["mean_wr"], torch.float64)
    assert mean - row["seq_gate"] == close(row["diff"], torch.float64)


# ---- Numeric safety ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype_name", list(VECTORS["numeric_safety"]["nan_grad_threshold"]))
def test_where_the_naive_formula_breaks_ours_does_not(dtype_name: str) -> None:
    threshold = float(VECTORS["numeric_safety"]["nan_grad_threshold"][dtype_name].removeprefix("d>="))
    dtype = getattr(torch, dtype_name)
    d = torch.tensor([threshold], dtype=dtype, requires_grad=True)
    (naive,) = torch.autograd.grad((4 * torch.sigmoid(d.exp() - 1)).sum(), d)
    assert naive.isnan().all()

    tokens = tokens_of([threshold], [0.0], [1.0], dtype)
    loss = build("sapo")(tokens).loss
    (gradient,) = torch.autograd.grad(loss.sum(), tokens.logprobs)
    assert loss.item() == -2.0  # saturated: -(2/tau) A
    assert gradient.item() == 0.0
