"""Objectives against a naive ground truth, against the contract every objective keeps, and against the maths of SAPO.

The ground truth is slow on purpose: python floats and the paper's double sum, nothing shared with the code it checks.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapo_learner.aggregation import token_weights
from sapo_learner.errors import ConfigError
from sapo_learner.objectives import LOG_RATIO_LIMIT, Objective, Tokens, available, build

torch.set_num_threads(1)
quick = settings(max_examples=40, deadline=None)
advantage = st.floats(-3, 3).filter(lambda a: a == 0 or abs(a) > 1e-3)
tau = st.floats(0.01, 20)

#: One response: its advantage, and per token (log pi_theta, log pi_old, mask).
Response = tuple[float, list[tuple[float, float, bool]]]
#: On a grid: equal numbers are equal then, and others so far apart that both sides of a bound agree on the side.
GRID = 0.00137
logprob = st.floats(-3, 0).map(lambda x: round(x / GRID) * GRID)
response = st.tuples(
    advantage,
    st.lists(st.tuples(logprob, logprob, st.booleans()), min_size=1, max_size=5).filter(lambda y: any(t[2] for t in y)),
)
batch = st.lists(response, min_size=1, max_size=4)


def pack(responses: list[Response], dtype: torch.dtype = torch.float64) -> Tokens:
    """The responses one after the other, with ids that are neither sorted nor dense."""
    ids = [(7919 * i) % 101 - 50 for i in range(len(responses))]
    rows = [(*token, a, i) for i, (a, y) in zip(ids, responses, strict=True) for token in y]
    new, old, mask, advantages, sequence = (list(column) for column in zip(*rows, strict=True))
    return make(new, old, advantages, mask=mask, ids=sequence, dtype=dtype)


def make(new: Any, old: Any, advantages: Any, mask: Any = None, ids: Any = None, dtype: Any = torch.float64) -> Tokens:
    """Tokens from lists; every token its own response unless `ids` says otherwise; every optional field is there."""
    logprobs = torch.tensor(new, dtype=dtype).requires_grad_()
    old = torch.tensor(old, dtype=dtype)
    return Tokens(
        logprobs=logprobs,
        behaviour_logprobs=old,
        advantages=torch.tensor(advantages, dtype=dtype),
        loss_mask=torch.ones(len(new), dtype=torch.bool) if mask is None else torch.tensor(mask),
        sequence_ids=torch.arange(len(new)) if ids is None else torch.tensor(ids),
        proximal_logprobs=old.clone(),
        entropy=torch.ones_like(old),
        policy_age=torch.zeros(len(new), dtype=torch.int64),
    )


def at_log_ratio(z: list[float], advantages: list[float], dtype: torch.dtype = torch.float64) -> Tokens:
    return make(z, [0.0] * len(z), advantages, dtype=dtype)


def total_and_gradient(objective: Objective, tokens: Tokens) -> tuple[float, Tensor]:
    total = (token_weights(tokens, "sequence_mean") * objective(tokens).loss).sum()
    (gradient,) = torch.autograd.grad(total, tokens.logprobs)
    return total.item(), gradient


def token_gradient(objective: Objective, tokens: Tokens) -> Tensor:
    """d loss_t / d logprob_t where every token is a response of its own."""
    (gradient,) = torch.autograd.grad(objective(tokens).loss.sum(), tokens.logprobs)
    return gradient


# ---- Ground truth: J = 1/G sum_i 1/|y_i| sum_t ..., the loss is -J -------------------------------------------------


def sapo_truth(responses: list[Response], tau_pos: float = 1.0, tau_neg: float = 1.05) -> float:
    """arXiv 2511.20347 Eq. 5 and 6, less the constant f(1) = 2/tau."""
    total = 0.0
    for a, y in responses:
        unmasked = [(new, old) for new, old, mask in y if mask]
        tau = tau_pos if a > 0 else tau_neg
        for new, old in unmasked:
            r = math.exp(new) / math.exp(old)
            f = 4 / tau * (1 / (1 + math.exp(-tau * (r - 1))))
            total += (f - 2 / tau) * a / len(unmasked)
    return -total / len(responses)


def grpo_truth(
    responses: list[Response], clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None
) -> float:
    """arXiv 2402.03300 Eq. 3 without KL, arXiv 1912.09729 for the dual clip."""
    total = 0.0
    for a, y in responses:
        unmasked = [(new, old) for new, old, mask in y if mask]
        for new, old in unmasked:
            r = math.exp(new) / math.exp(old)
            term = min(r * a, min(max(r, 1 - clip_low), 1 + clip_high) * a)
            if dual_clip is not None and a < 0:
                term = max(term, dual_clip * a)
            total += term / len(unmasked)
    return -total / len(responses)


def gspo_truth(responses: list[Response], clip_low: float = 3e-4, clip_high: float = 4e-4) -> float:
    """arXiv 2507.18071 Eq. 5 and 7: the ratio of whole responses, to the power 1/|y|."""
    total = 0.0
    for a, y in responses:
        unmasked = [(new, old) for new, old, mask in y if mask]
        product = math.prod(math.exp(new) / math.exp(old) for new, old in unmasked)
        s = product ** (1 / len(unmasked))
        total += min(s * a, min(max(s, 1 - clip_low), 1 + clip_high) * a)
    return -total / len(responses)


CASES = [
    ("sapo", sapo_truth, {}),
    ("sapo", sapo_truth, {"tau_pos": 0.5, "tau_neg": 3.0}),
    ("grpo", grpo_truth, {}),
    ("grpo", grpo_truth, {"clip_low": 0.1, "clip_high": 0.5, "dual_clip": 1.5}),
    ("dr_grpo", grpo_truth, {}),
    ("dapo", partial(grpo_truth, clip_high=0.28), {}),
    ("gspo", gspo_truth, {}),
    ("gspo", gspo_truth, {"clip_low": 0.3, "clip_high": 0.2}),
]


@pytest.mark.parametrize(("name", "truth", "options"), CASES)
@quick
@given(responses=batch)
def test_value_is_the_papers_double_sum(
    name: str, truth: Callable[..., float], options: dict[str, float], responses: list[Response]
) -> None:
    value, _ = total_and_gradient(build(name, **options), pack(responses))
    assert value == pytest.approx(truth(responses, **options), rel=1e-11, abs=1e-12)


FIXED: list[Response] = [
    (1.3, [(-0.5, -0.6, True), (-1.2, -1.0, True), (-0.9, -9.0, False), (-0.3, -1.1, True)]),
    (-0.7, [(-0.7, -0.2, True), (-1.5, -1.2, True), (-0.9, -2.0, True)]),
    (-0.6, [(-0.71, -0.7, True), (-0.4, -0.6, False)]),
]


@pytest.mark.parametrize(("name", "truth", "options"), CASES)
def test_gradient_is_the_slope_of_the_double_sum(
    name: str, truth: Callable[..., float], options: dict[str, float]
) -> None:
    _, gradient = total_and_gradient(build(name, **options), pack(FIXED))
    h = 1e-6
    slopes = []
    for i, (a, y) in enumerate(FIXED):
        for t, (new, old, mask) in enumerate(y):
            moved = [
                truth([*FIXED[:i], (a, [*y[:t], (new + step, old, mask), *y[t + 1 :]]), *FIXED[i + 1 :]], **options)
                for step in (h, -h)
            ]
            slopes.append((moved[0] - moved[1]) / (2 * h))
    assert gradient.tolist() == pytest.approx(slopes, abs=1e-9)


#: Those with their ground truth in test_other_objectives.py, which asserts that it has each of them.
IN_THE_OTHER_FILE = {"gspo_token", "reinforce", "rloo", "cispo", "dppo", "vespo", "gmpo", "cppo", "aspo", "bapo"}
IN_THE_OTHER_FILE |= {"minpro", "r2vpo", "sspo", "espo"}


def test_every_objective_has_a_ground_truth() -> None:
    assert set(available()) <= {name for name, _, _ in CASES} | IN_THE_OTHER_FILE


# ---- Contract: whatever lies in the folder keeps it ----------------------------------------------------------------

every_objective = pytest.mark.parametrize("name", available())

#: What the contract assumes and a published objective does not keep, with the reason.
MOVES_WITHOUT_ADVANTAGE = {"r2vpo": "penalises (r - 1)^2 whatever the advantage is"}
ORDERED = {
    "cppo": "what the tokens before have moved is taken off a token's allowance",
    "minpro": "the tokens before weigh a token",
}


@every_objective
@quick
@given(responses=batch)
def test_on_policy_the_gradient_is_the_policy_gradient(name: str, responses: list[Response]) -> None:
    """T2, T13: with log pi_theta = log pi_old every objective is REINFORCE with the same weights."""
    tokens = pack([(a, [(new, new, mask) for new, _, mask in y]) for a, y in responses])
    _, gradient = total_and_gradient(build(name), tokens)
    expected = -tokens.advantages * token_weights(tokens, "sequence_mean")
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@every_objective
@quick
@given(responses=batch, other=response)
def test_a_response_does_not_feel_its_neighbours(name: str, responses: list[Response], other: Response) -> None:
    objective, own = build(name), len(other[1])
    alone, among = objective(pack([other])), objective(pack([*responses, other]))
    torch.testing.assert_close(among.loss[-own:], alone.loss, rtol=1e-13, atol=1e-14)


@every_objective
def test_advantage_zero_moves_nothing(name: str) -> None:
    tokens = at_log_ratio([0.0, 0.5, -3.0, 100.0, -100.0], [0.0] * 5, torch.float32)
    surrogate = build(name)(tokens)
    still = slice(0, 1) if name in MOVES_WITHOUT_ADVANTAGE else slice(0, 5)  # on-policy all of them stand still
    assert not surrogate.loss[still].any()
    assert not torch.autograd.grad(surrogate.loss.sum(), tokens.logprobs)[0][still].any()


@every_objective
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_far_off_policy_stays_finite(name: str, dtype: torch.dtype) -> None:
    """T8: also where an engine recorded -inf; the masked slots hold what no computation survives."""
    z = [0.1, 12.0, 89.0, 1000.0, -89.0, -1000.0, math.inf, -math.inf, math.inf, -math.inf, math.nan, math.nan]
    masked = [False] * 8 + [True] * 4
    for sign in (1.0, -1.0):
        advantages = [sign] * 10 + [math.nan, sign]
        tokens = make([-1.0] * 12, [-1.0 - each for each in z], advantages, mask=[not m for m in masked], dtype=dtype)
        surrogate = build(name)(tokens)
        (gradient,) = torch.autograd.grad(surrogate.loss.sum(), tokens.logprobs)
        assert surrogate.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gradient.dtype == dtype
        assert surrogate.loss.isfinite().all()
        assert gradient.isfinite().all()
        assert surrogate.loss[masked].tolist() == gradient[masked].tolist() == [0.0] * 4
        assert all(value.isfinite().all() for value in surrogate.diagnostics.values())


@every_objective
@quick
@given(responses=batch, order=st.randoms(use_true_random=False))
def test_order_packing_and_padding_change_nothing(name: str, responses: list[Response], order: Any) -> None:
    """T9. Padding is a masked token of the response; interleaving is the extreme of packing. What reads the
    order inside a response keeps that order."""
    tokens = pack(responses)
    value, gradient = total_and_gradient(build(name), tokens)
    padded = pack([(a, [*y, (-0.1, -3.0, False), (0.0, 0.0, False)]) for a, y in responses])
    assert total_and_gradient(build(name), padded)[0] == pytest.approx(value, rel=1e-12, abs=1e-14)
    shuffle = list(range(len(tokens.logprobs)))
    order.shuffle(shuffle)
    if name in ORDERED:
        ids = tokens.sequence_ids.tolist()
        in_order = {i: iter([at for at, each in enumerate(ids) if each == i]) for i in ids}
        shuffle = [next(in_order[ids[at]]) for at in shuffle]
    fields = {field: value.detach()[shuffle] for field, value in vars(tokens).items() if value is not None}
    shuffled = Tokens(**(fields | {"logprobs": fields["logprobs"].requires_grad_()}))
    other_value, other_gradient = total_and_gradient(build(name), shuffled)
    assert other_value == pytest.approx(value, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(other_gradient, gradient[shuffle], rtol=1e-12, atol=1e-14)


@every_objective
def test_call_is_pure_and_diagnostics_are_per_token(name: str) -> None:
    objective, tokens = build(name), pack(FIXED)
    first, second = objective(tokens), objective(tokens)
    assert first.loss.tolist() == second.loss.tolist()
    assert first.diagnostics
    for value in first.diagnostics.values():
        assert value.shape == tokens.logprobs.shape
        assert value.dtype == tokens.dtype
        assert not value.requires_grad


# ---- SAPO: the properties of its gate ------------------------------------------------------------------------------


def gate_and_gradient(z: list[float], a: float, **options: float) -> tuple[Tensor, Tensor]:
    objective, tokens = build("sapo", **options), at_log_ratio(z, [a] * len(z))
    return objective(tokens).diagnostics["gate"], token_gradient(objective, tokens)


@quick
@given(t=tau, a=advantage)
def test_t1_t2_slope_one_on_policy_for_every_tau(t: float, a: float) -> None:
    gate, gradient = gate_and_gradient([0.0], a, tau_pos=t, tau_neg=t)
    assert gate.item() == 1
    assert gradient.item() == pytest.approx(-a, rel=1e-12)


@quick
@given(t=tau, d=st.floats(1e-6, 1 - 1e-6))
def test_t3_gate_is_sech_squared_and_symmetric_in_the_ratio(t: float, d: float) -> None:
    gate, gradient = gate_and_gradient([math.log1p(d), math.log1p(-d)], 1.0, tau_pos=t)
    assert gate.tolist() == pytest.approx([1 / math.cosh(t * d / 2) ** 2] * 2, rel=1e-6, abs=1e-12)
    assert ((gate > 0) & (gate <= 1)).all()
    assert gradient.tolist() == pytest.approx([-(1 + d) * gate[0].item(), -(1 - d) * gate[1].item()], rel=1e-6)


@quick
@given(r=st.floats(0.25, 4), a=st.sampled_from([-1.0, 1.0]))
def test_t4_small_tau_is_plain_importance_sampling(r: float, a: float) -> None:
    _, gradient = gate_and_gradient([math.log(r)], a, tau_pos=1e-4, tau_neg=1e-4)
    assert gradient.item() == pytest.approx(-a * r, abs=1e-6)


@quick
@given(t=st.floats(0.1, 20), z=st.floats(-5, 5), a=st.sampled_from([-1.0, 1.0]))
def test_t5_gradient_never_exceeds_its_peak(t: float, z: float, a: float) -> None:
    """The peak of r w(r) solves tau r tanh(tau (r-1)/2) = 1; found here by bisection, its left side grows with r."""
    low, high = 1.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t * middle * math.tanh(t * (middle - 1) / 2) < 1 else (low, middle)
    peak = low / math.cosh(t * (low - 1) / 2) ** 2
    _, gradient = gate_and_gradient([z, math.log(low)], a, tau_pos=t, tau_neg=t)
    assert abs(gradient[0].item()) <= peak * (1 + 1e-9)
    assert abs(gradient[1].item()) == pytest.approx(peak, rel=1e-9)


@quick
@given(r=st.floats(0.05, 3), step=st.floats(0.01, 1), t=st.floats(0.1, 3))
def test_t6_value_grows_with_the_ratio_and_the_gate_closes(r: float, step: float, t: float) -> None:
    tokens = at_log_ratio([math.log(r), math.log(r + step)], [1.0, 1.0])
    here, there = (-build("sapo", tau_pos=t)(tokens).loss).tolist()  # f(r) - 2/tau
    assert here < there < 2 / t
    assert here > -(2 / t) * math.tanh(t / 2)  # f(0)
    distance = [abs(r - 1), abs(r - 1) + step]
    gate, _ = gate_and_gradient([math.log1p(d) for d in distance], 1.0, tau_pos=t)
    assert gate[1] < gate[0]
    wider, _ = gate_and_gradient([math.log1p(distance[1])], 1.0, tau_pos=t * 1.1)
    assert wider[0] < gate[1]


@quick
@given(z=st.floats(-100, 100), a=advantage)
def test_t7_good_tokens_rise_and_bad_ones_fall(z: float, a: float) -> None:
    _, gradient = gate_and_gradient([z], a)
    assert gradient.item() * a <= 0
    assert math.isfinite(gradient.item())


def test_temperature_follows_the_sign_of_the_advantage() -> None:
    tokens = at_log_ratio([1.0, 1.0], [2.0, -2.0])
    gate = build("sapo", tau_pos=0.5, tau_neg=3.0)(tokens).diagnostics["gate"]
    assert gate.tolist() == pytest.approx([1 / math.cosh(t * (math.e - 1) / 2) ** 2 for t in (0.5, 3.0)], rel=1e-12)


# ---- GRPO and GSPO: where the clip acts ----------------------------------------------------------------------------


def test_grpo_clips_one_side_only() -> None:
    z = [math.log(r) for r in (0.7, 1.0, 1.4, 3.0)]
    for a, passes in ((1.0, [True, True, False, False]), (-1.0, [False, True, True, True])):
        tokens = at_log_ratio(z, [a] * 4)
        assert [g != 0 for g in token_gradient(build("grpo"), tokens).tolist()] == passes
        assert [c == 0 for c in build("grpo")(tokens).diagnostics["clipped"].tolist()] == passes
    assert "dual_clipped" not in build("grpo")(tokens).diagnostics
    dual = build("grpo", dual_clip=2.0)
    assert dual(tokens).diagnostics["dual_clipped"].tolist() == [0, 0, 0, 1]
    assert token_gradient(dual, tokens)[3].item() == 0


@quick
@given(zs=st.lists(st.floats(-2, 2), min_size=1, max_size=6), a=advantage)
def test_t11_gspo_gradient_inside_the_band(zs: list[float], a: float) -> None:
    """- A s / |y| on every token, once the weights of sequence_mean have spread the response's loss."""
    tokens = make(zs, [0.0] * len(zs), [a] * len(zs), ids=[3] * len(zs))
    _, gradient = total_and_gradient(build("gspo", clip_low=1.0, clip_high=1e9), tokens)
    s = math.exp(sum(zs) / len(zs))
    assert gradient.tolist() == pytest.approx([-a * s / len(zs)] * len(zs), rel=1e-12)


def test_gspo_mean_leaves_masked_tokens_out() -> None:
    tokens = make([0.3, 5.0, 0.1], [0.0] * 3, [1.0] * 3, mask=[True, False, True], ids=[-4] * 3)
    assert build("gspo")(tokens).diagnostics["ratio"].tolist() == pytest.approx([math.exp(0.2)] * 3, rel=1e-12)


# ---- Tokens and build ----------------------------------------------------------------------------------------------


def test_log_ratio_is_masked_widened_and_clamped() -> None:
    tokens = make([-1.0, -1.0, -1.0, -1.0], [-1.5, -99.0, 99.0, math.nan], [1.0] * 4, [True] * 3 + [False], dtype=None)
    assert tokens.log_ratio.tolist() == [0.5, LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT, 0.0]
    assert tokens.clamped.tolist() == [0, 1, 1, 0]
    half = make([-8.0], [-(2**-6)], [1.0], dtype=torch.bfloat16)
    assert half.log_ratio.dtype == torch.float32
    assert half.log_ratio.item() == -8 + 2**-6  # ten bits, and bfloat16 has eight: it would subtract to -8


def test_gradient_does_not_flow_through_the_behaviour_policy() -> None:
    logprobs = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    tokens = Tokens(logprobs, logprobs, one, one.bool(), one.long())
    assert token_gradient(build("sapo"), tokens).item() == -1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("behaviour_logprobs", torch.zeros(3)),
        ("entropy", torch.zeros(2, 1)),
        ("loss_mask", torch.ones(2)),
        ("sequence_ids", torch.zeros(2, dtype=torch.int32)),
        ("logprobs", torch.zeros(2, 1)),
        ("logprobs", torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_tokens_refuse_wrong_shapes_and_dtypes(field: str, value: Tensor) -> None:
    right: dict[str, Any] = {each: torch.zeros(2) for each in ("logprobs", "behaviour_logprobs", "advantages")}
    right |= {"loss_mask": torch.ones(2, dtype=torch.bool), "sequence_ids": torch.zeros(2, dtype=torch.int64)}
    Tokens(**right)
    with pytest.raises(ValueError, match=field):
        Tokens(**(right | {field: value}))


def test_build_finds_every_file() -> None:
    assert {"sapo", "grpo", "gspo"} <= set(available())
    assert available() == sorted(available())
    for name in available():
        assert type(build(name)).__module__ == f"sapo_learner.objectives.{name}"
    assert build("grpo", clip_low=0.3).model_dump() == {"clip_low": 0.3, "clip_high": 0.2, "dual_clip": None}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sapoo", {}, "unknown objective 'sapoo', did you mean 'sapo'"),
        ("ppo_with_a_critic", {}, r"known: .*grpo, gspo.*, sapo"),
        ("sapo", {"tau_negative": 1.1}, "unknown key 'tau_negative', did you mean 'tau_neg'"),
        ("sapo", {"clip_low": 0.2}, "known: age_full, .*, tau_neg, tau_pos"),
        ("sapo", {"tau_pos": 0}, "'tau_pos': Input should be greater than 0"),
        ("sapo", {"tau_pos": math.inf}, "finite"),
        ("sapo", {"tau_neg": "warm"}, "'tau_neg'.*valid number"),
        ("grpo", {"clip_low": 1.5}, "clip_low"),
        ("grpo", {"dual_clip": 1.0}, "dual_clip"),
        ("gspo", {"clip_high": -1e-4}, "clip_high"),
    ],
)
def test_build_explains_what_is_wrong(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, **options)
