"""Filters against published check values, against their rules in plain python, and the contract that all keep.

The ground truth is slow on purpose: python floats, nothing shared with the code it checks.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapo_learner.aggregation import count, token_weights
from sapo_learner.config import FilterSettings, LearnerSettings, parse
from sapo_learner.errors import ConfigError
from sapo_learner.filters import Filter, available, build, build_all, combine
from sapo_learner.learner import Learner
from sapo_learner.objectives import Tokens
from sapo_learner.objectives import build as build_objective
from sapo_learner.policy import tiny_policy
from services import preflight
from services.explain import explain
from services.runtime.settings import RunConfig
from tests.recorded import ALPHABET, group, random_group, response
from tests.sapo_learner.test_learner import batch_of, settings_of

torch.set_num_threads(1)
quick = settings(max_examples=40, deadline=None)
VECTORS = json.loads((Path(__file__).parent / "vectors" / "related.json").read_text())

#: One response: its advantage, whether it was cut off, and per token (log pi_theta, log pi_old, mask, age).
Response = tuple[float, bool, list[tuple[float, float, bool, int]]]
# On a grid, so that a distance is either exactly a threshold or far from it.
logprob = st.integers(-24, 0).map(lambda n: n / 8)
answer = st.tuples(
    st.sampled_from([-1.5, -0.5, 0.0, 0.5, 2.0]),
    st.booleans(),
    st.lists(st.tuples(logprob, logprob, st.booleans(), st.integers(0, 9)), min_size=1, max_size=6),
)
batch = st.lists(answer, min_size=1, max_size=4)


def pack(responses: list[Response], first: int = 0) -> Tokens:
    """The responses one after the other, with ids that are neither sorted nor dense."""
    rows = [(*t, a, cut, (7919 * (first + i)) % 101) for i, (a, cut, y) in enumerate(responses) for t in y]
    new, old, mask, age, advantages, cut, ids = (list(column) for column in zip(*rows, strict=True))
    return Tokens(
        logprobs=torch.tensor(new, dtype=torch.float64).requires_grad_(),
        behaviour_logprobs=torch.tensor(old, dtype=torch.float64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        loss_mask=torch.tensor(mask),
        sequence_ids=torch.tensor(ids),
        policy_age=torch.tensor(age),
        truncated=torch.tensor(cut),
    )


# The batch of the check values: three responses of 4, 3 and 2 tokens, rewards 1, 0, 0.
NEW = [[-0.5, -1.2, -0.3, -2.0], [-0.7, -0.9, -1.5], [-1.1, -0.4]]
OLD = [[-0.6, -1.0, -0.3, -2.9], [-0.7, -1.4, -1.2], [-0.8, -0.6]]
EXAMPLE = pack(
    [
        (a, False, [(new, old, True, 0) for new, old in zip(*each, strict=True)])
        for a, *each in zip((2**0.5, -(0.5**0.5), -(0.5**0.5)), NEW, OLD, strict=True)
    ]
)
PLAIN = build_objective("grpo", clip_low=1.0, clip_high=1e6)  # the ratio itself


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def loss_and_gradient(name: str | None, mask: Filter, tokens: Tokens) -> tuple[float, list[float]]:
    """Of the filtered objective, as the paper of SAPO writes it: with the constant 2/tau that ours leaves out."""
    keep, _ = combine({"mask": mask}, tokens)
    assert keep is not None
    per_token = PLAIN(tokens).loss
    if name == "sapo":
        tau = torch.where(tokens.advantages > 0, 1.0, torch.tensor(1.05, dtype=torch.float64))
        per_token = build_objective("sapo")(tokens).loss - 2 / tau * tokens.advantages
    loss = (token_weights(tokens, "sequence_mean") * keep * per_token).sum()
    return loss.item(), torch.autograd.grad(loss, tokens.logprobs)[0].tolist()


# ---- Check values (digits as many as the file has)


@pytest.mark.parametrize("name", ["negative_sequence_mask", "off_policy_sequence_mask"])
@pytest.mark.parametrize("threshold", VECTORS["sapo_sm"])
def test_check_values_of_the_negative_sequence_mask(name: str, threshold: str) -> None:
    expected, mask = VECTORS["sapo_sm"][threshold], build(name, threshold=float(threshold))
    assert mask(EXAMPLE).tolist() == [keep for keep, row in zip(expected["keep"], NEW, strict=True) for _ in row]
    loss, gradient = loss_and_gradient("sapo", mask, EXAMPLE)
    assert loss == pytest.approx(expected["loss"], abs=2e-12)
    assert gradient == pytest.approx(flat(expected["grad"]), abs=2e-12)


COMBINED = {
    "sapo*dppo_tv0.2": ("sapo", "dppo_mask", {"threshold": 0.2}),
    "sapo*dppo_tv0.15": ("sapo", "dppo_mask", {"threshold": 0.15}),
    "sapo*dppo_tv0.1": ("sapo", "dppo_mask", {"threshold": 0.1}),
    "dppo_tv0.15": (None, "dppo_mask", {"threshold": 0.15}),
    "cppo d.15 db.015 w.8": (None, "cppo_mask", {}),
    "sapo*cppo d.15 db.015 w.8": ("sapo", "cppo_mask", {}),
}


@pytest.mark.parametrize("case", COMBINED)
def test_check_values_of_dppo_and_cppo_over_the_ratio_and_over_sapo(case: str) -> None:
    objective, name, options = COMBINED[case]
    expected, mask = VECTORS["combos"][case], build(name, **options)
    assert mask(EXAMPLE).tolist() == flat(expected["keep"])
    loss, gradient = loss_and_gradient(objective, mask, EXAMPLE)
    assert loss == pytest.approx(expected["loss_seq_mean"], abs=2e-12)
    assert gradient == pytest.approx(flat(expected["grad"]), abs=2e-12)


@pytest.mark.parametrize("row", VECTORS["dppo"], ids=lambda row: f"{row['logp']}_{row['logq']}_{row['A']}")
def test_check_values_of_the_dppo_mask_token_by_token(row: dict[str, float]) -> None:
    tokens = pack([(row["A"], False, [(row["logp"], row["logq"], True, 0)])])
    kinds = {"tv0.15": ("tv", 0.15), "tv0.2": ("tv", 0.2), "kl0.05": ("kl", 0.05)}
    found = {kind: build("dppo_mask", divergence=d, threshold=t)(tokens).item() for kind, (d, t) in kinds.items()}
    assert found == {kind: row[f"keep_{kind}"] for kind in kinds}
    assert build("dppo_mask")(tokens).item() == row["keep_tv0.2"]  # the defaults
    assert build("dppo_mask", divergence="kl")(tokens).item() == row["keep_kl0.05"]


@pytest.mark.parametrize("case", [key for key in VECTORS["cppo"] if "=" in key])
def test_check_values_of_the_cppo_budget(case: str) -> None:
    """The file gives ratios and divergences; probabilities that have both are q = D / |r - 1|, p = r q."""
    advantage, threshold, budget = (float(part.split("=")[1]) for part in case.split())
    rows = []
    for ratio, divergence in zip(VECTORS["cppo"]["r"], VECTORS["cppo"]["D"], strict=True):
        old = divergence / abs(ratio - 1)
        rows.append((math.log(ratio * old), math.log(old), True, 0))
    found = build("cppo_mask", threshold=threshold, budget=budget)(pack([(advantage, False, rows)]))
    assert found.tolist() == VECTORS["cppo"][case][0]


# ---- Rules in plain python


def truth(name: str, a: float, cut: bool, y: list[tuple[float, float, bool, int]]) -> list[float]:
    """What each unmasked token of a response keeps, with the default options."""
    seen = [(new, old, age) for new, old, mask, age in y if mask]
    distance = sum(old - new for new, old, _ in seen) / max(len(seen), 1)
    kept, weights, moved = [], 0.0, 0.0
    for t, (new, old, age) in enumerate(seen):
        p, q = math.exp(new), math.exp(old)
        away = a * (p / q - 1) > 0
        weight = 1 - 0.2 * t / (len(seen) - 1) if len(seen) > 1 else 1.0
        allowed = min(0.15, 0.15 + 0.015 * weights - moved)
        rules = {
            "negative_sequence_mask": a >= 0 or distance <= 0.5,
            "off_policy_sequence_mask": a >= 0 or distance <= 0.5,
            "policy_age": age <= 4,
            "icepop": 0.5 <= p / q <= 5.0,
            "dppo_mask": not (away and abs(p - q) > 0.2),
            "cppo_mask": not (away and weight * abs(p - q) > allowed),
            "overlong": not cut,
        }
        kept.append(float(rules[name]))
        weights, moved = weights + weight, moved + weight * abs(p - q)
    return kept


@pytest.mark.parametrize("name", available())
@quick
@given(responses=batch)
def test_rules(name: str, responses: list[Response]) -> None:
    tokens = pack(responses)
    found = build(name)(tokens)
    assert found[tokens.loss_mask].tolist() == flat([truth(name, *each) for each in responses])
    assert (found[~tokens.loss_mask] == 1).all()


def test_thresholds_themselves_are_kept() -> None:
    """d == delta, age == max_age, and a ratio on the edge of the band."""
    tokens = pack([(-1.0, False, [(-1.0, -0.5, True, 2)])])
    assert build("negative_sequence_mask", threshold=0.5)(tokens).item() == 1
    assert build("negative_sequence_mask", threshold=0.499)(tokens).item() == 0
    assert build("policy_age", max_age=2)(tokens).item() == 1
    assert build("policy_age", max_age=1)(tokens).item() == 0
    ratio = torch.tensor(-0.5, dtype=torch.float64).exp().item()
    assert build("icepop", low=ratio, high=1)(tokens).item() == 1
    assert build("icepop", low=ratio + 1e-9, high=1)(tokens).item() == 0


def test_without_a_budget_the_cppo_mask_closes_once_the_threshold_is_spent() -> None:
    """c_t is negative then: nothing that moves away is kept, however little it moves."""
    far = (math.log(0.5), math.log(0.2), True, 0)
    near, back = (math.log(0.5001), math.log(0.5), True, 0), (math.log(0.2), math.log(0.5), True, 0)
    found = build("cppo_mask", budget=0)(pack([(1.0, False, [near, far, near, back])]))
    assert found.tolist() == [1, 0, 0, 1]


# ---- The contract


@pytest.mark.parametrize("name", available())
@quick
@given(responses=batch, data=st.data())
def test_contract_packing_does_not_matter(name: str, responses: list[Response], data: Any) -> None:
    """The order of responses, which of them are in one microbatch, and their ids."""
    each_alone = [build(name)(pack([each])) for each in responses]
    order = data.draw(st.permutations(range(len(responses))))
    cut = data.draw(st.integers(1, len(responses)))
    parts = [order[:cut], order[cut:]]
    found = [build(name)(pack([responses[i] for i in part], first=17)) for part in parts if part]
    assert torch.equal(torch.cat(found), torch.cat([each_alone[i] for i in order]))


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 1e30, 0.0])
def test_contract_masked_slots_do_not_matter(name: str, rubbish: float) -> None:
    y = [(-0.5, -2.0, True, 0), (-0.5, -0.5, False, 9), (-2.0, -0.7, True, 9), (-2.0, -0.5, False, 0)]
    tokens = pack([(1.0, False, y), (-1.0, True, y[::-1])])
    fields = dict(vars(tokens))
    for field in ("logprobs", "behaviour_logprobs", "advantages"):
        fields[field] = fields[field].detach().masked_fill(~tokens.loss_mask, rubbish)
    assert torch.equal(build(name)(Tokens(**fields)), build(name)(tokens))


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_contract_pure_bounded_and_without_gradient(name: str, dtype: torch.dtype) -> None:
    y = [(-0.5, -2.0, True, 0), (-0.5, -0.5, False, 9), (-2.0, -0.7, True, 9), (-40.0, -0.1, True, 0)]
    fields = dict(vars(pack([(1.0, False, y), (-1.0, True, y[::-1])])))
    tokens = Tokens(**(fields | {"logprobs": fields["logprobs"].detach().to(dtype).requires_grad_()}))
    before = {field: value.detach().clone() for field, value in vars(tokens).items() if value is not None}
    chosen = build(name)
    keep = chosen(tokens)
    assert torch.equal(chosen(tokens), keep)
    assert keep.dtype == tokens.dtype
    assert not keep.requires_grad
    assert ((keep >= 0) & (keep <= 1)).all()
    assert all(torch.equal(getattr(tokens, field), value) for field, value in before.items())


@pytest.mark.parametrize("name", available())
def test_contract_every_filter_drops_something_and_says_where_it_is_from(name: str) -> None:
    """So that no test above passes on a filter that keeps all."""
    y = [(-0.1, -3.0, True, 9), (-3.0, -0.1, True, 0), (-0.5, -0.4, True, 0), (-3.0, -0.1, True, 0)]
    keep = build(name)(pack([(1.0, False, y), (-1.0, True, y)]))
    assert 0 < keep.sum() < len(keep)
    assert build(name).source or name == "policy_age"


# ---- Combination and configuration


class Half(Filter):
    """A weight, not a yes or no."""

    def keep(self, tokens: Tokens) -> Tensor:
        return torch.full_like(tokens.logprobs, 0.5)


class Inside(Filter):
    """Looks into the model, as CAPO would."""

    needs_hidden = True

    def keep(self, tokens: Tokens) -> Tensor:
        assert tokens.hidden is not None
        assert not tokens.hidden.requires_grad
        return tokens.hidden[:, 0] > 0


def test_filters_multiply_and_each_reports_what_it_alone_drops() -> None:
    filters = {"half": Half(), "other": Half(), "policy_age": build("policy_age")}
    tokens = pack([(1.0, False, [(-1.0, -1.0, True, 0), (-1.0, -1.0, True, 9), (-1.0, -1.0, False, 9)])])
    keep, dropped = combine(filters, tokens)
    assert keep is not None
    assert keep.tolist() == [0.25, 0, 1]
    assert {name: each.tolist() for name, each in dropped.items()} == {
        "dropped_half": [0.5, 0.5, 0],
        "dropped_other": [0.5, 0.5, 0],
        "dropped_policy_age": [0, 1, 0],
    }
    assert combine({}, tokens) == (None, {})


class Probability(Filter):
    """A weight that depends on the policy."""

    def keep(self, tokens: Tokens) -> Tensor:
        return tokens.logprobs.exp()


def test_a_weight_that_depends_on_the_policy_is_a_constant_of_the_step() -> None:
    tokens = pack([(1.0, False, [(-1.0, -1.0, True, 0), (-2.0, -1.0, True, 0)])])
    keep = Probability()(tokens)
    assert not keep.requires_grad
    assert keep.tolist() == pytest.approx([math.exp(-1), math.exp(-2)])


def test_a_dropped_token_raises_no_others_weight() -> None:
    settings = settings_of()
    policy, groups = tiny_policy(ALPHABET, seed=0), [random_group(0)]
    batch = batch_of(groups, settings)
    (microbatch,) = batch.microbatches
    learner = Learner(policy, settings, temperature=1.0)
    tokens = learner.tokens(microbatch)
    surrogate = learner.objective(tokens).loss.detach()
    first = tokens.sequence_ids == tokens.sequence_ids[0]

    class First(Filter):
        def keep(self, tokens: Tokens) -> Tensor:
            return tokens.sequence_ids == tokens.sequence_ids[0]

    learner.filters = {"first": First()}
    report = learner.step(batch)
    expected = (token_weights(tokens, "sequence_mean", batch.counts) * surrogate)[first].sum()
    assert report.loss == pytest.approx(expected.item(), rel=1e-6)
    assert batch.counts == count(tokens.loss_mask, tokens.sequence_ids)  # of all, also of those that are dropped


def test_the_learner_reports_the_share_that_each_filter_drops_by_sign() -> None:
    good = response([5, 6, 7], reward=1.0, steps=[0, 2, 4], mask=[True, False, True])
    bad = response([8, 9], reward=0.0, steps=4, finish_reason="length")
    settings = settings_of().model_copy(
        update={"filters": [FilterSettings(name="policy_age", max_age=2), FilterSettings(name="overlong")]}
    )
    learner = Learner(tiny_policy(ALPHABET, seed=0), settings, temperature=1.0)
    report = learner.step(batch_of([group([good, bad])], settings, step=5, budget=1))
    assert report.diagnostics["dropped_policy_age"] == {"all": 1 / 4, "positive": 1 / 2, "negative": 0}
    assert report.diagnostics["dropped_overlong"] == {"all": 2 / 4, "positive": 0, "negative": 1}
    assert report.tokens == 4  # as many as without filters


def test_a_step_that_is_dropped_whole_has_no_gradient() -> None:
    settings = settings_of().model_copy(update={"filters": [FilterSettings(name="policy_age", max_age=0)]})
    learner = Learner(tiny_policy(ALPHABET, seed=0), settings, temperature=1.0)
    report = learner.step(batch_of([random_group(0)], settings, step=1))
    assert (report.applied, report.gradient_norm, report.loss) == (True, 0, 0)


def test_hidden_states_are_there_for_the_filter_that_asks() -> None:
    settings = settings_of()
    learner = Learner(tiny_policy(ALPHABET, seed=0), settings, temperature=1.0)
    batch = batch_of([random_group(0)], settings)
    assert learner.tokens(batch.microbatches[0]).hidden is None
    learner.filters = {"inside": Inside()}
    hidden = learner.tokens(batch.microbatches[0]).hidden
    assert hidden is not None
    assert hidden.shape == (len(batch.microbatches[0].targets), learner.policy.head_weight.shape[1])
    assert 0 < learner.step(batch).diagnostics["dropped_inside"]["all"] < 1


def test_a_filter_in_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from sapo_learner.filters import Filter\n\n\n"
        "class Mine(Filter):\n    share: float = 0.25\n\n"
        "    def keep(self, tokens):\n        return tokens.logprobs * 0 + self.share\n"
    )
    filters = build_all([FilterSettings(name=str(path), share=0.5)])
    assert list(filters) == ["mine"]
    assert filters["mine"](EXAMPLE).tolist() == [0.5] * 9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"name": "policy_aeg"}], r"did you mean 'policy_age'\? known: cppo_mask, dppo_mask"),
        ([{"name": "policy_age", "age": 1}], r"unknown key 'age'.*max_age"),
        ([{"name": "policy_age", "max_age": -1}], "max_age"),
        ([{"name": "policy_age"}, {"name": "policy_age", "max_age": 2}], "'policy_age' is there 2 times"),
        ([{"name": "icepop", "low": 2, "high": 1}], "nothing would be kept"),
        ([{"max_age": 2}], "'filters.0.name' is required"),
    ],
)
def test_wrong_filters_are_refused_in_a_sentence(given: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_all(parse(LearnerSettings, {"filters": given}, where="run.yaml").filters)


def test_refused_filters_leave_the_learner_as_it_was() -> None:
    learner = Learner(tiny_policy(ALPHABET, seed=0), settings_of(), temperature=1.0)
    before = (learner.objective, learner.filters, learner.settings)
    with pytest.raises(ConfigError):
        learner.change_settings(settings_of("grpo").model_copy(update={"filters": [FilterSettings(name="nothing")]}))
    assert (learner.objective, learner.filters, learner.settings) == before


def test_what_a_filter_cannot_do_without_is_named() -> None:
    fields = vars(EXAMPLE) | {"truncated": None}
    with pytest.raises(ValueError, match=r"Tokens\.truncated"):
        build("overlong")(Tokens(**fields))


def test_the_resolved_configuration_names_every_option() -> None:
    config = RunConfig.model_validate({"filters": [{"name": "icepop", "high": 3}, {"name": "overlong"}]})
    resolved = preflight.check(config)
    assert resolved["filters"] == [{"name": "icepop", "low": 0.5, "high": 3.0}, {"name": "overlong"}]
    assert RunConfig.model_validate(resolved).filters[0].options == {"low": 0.5, "high": 3.0}
    with pytest.raises(ConfigError, match="unknown filter 'icepopp'"):
        preflight.check(RunConfig.model_validate({"filters": [{"name": "icepopp"}]}))


def test_explain_lists_the_options_of_every_filter() -> None:
    assert [line for line in explain("filters") if line.startswith("options of")] == [
        f"options of filters.name: {name}" for name in available()
    ]
    assert explain("filters.max_age")[:2] == [
        "with filters.name: policy_age",
        "filters.max_age  (integer, >= 0, default 4)",
    ]
    assert set(explain("filters")) < set(explain(""))
    with pytest.raises(ConfigError, match="is a value"):
        explain("filters.nothing")
