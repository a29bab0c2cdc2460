"""Where tokens are sent: hooks against a count by hand, with every expert asked for on its own."""

from typing import Any

import pytest
import torch

from sapo_learner.batching import TrainingBatch, idle_microbatch
from sapo_learner.config import LearnerSettings, ParallelSettings
from sapo_learner.learner import Learner
from sapo_learner.parallel import ALONE
from sapo_learner.router_load import RouterLoad, figures
from tests.recorded import random_group
from tests.sapo_learner.ranked_models import learner_of, model_policy
from tests.sapo_learner.recorded_steps import batch_of, settings_of

NAMES = {"router_load_max", "router_load_cv", "router_idle_experts"}


def batch(settings: LearnerSettings, budget: int = 40) -> TrainingBatch:
    return batch_of(settings, [random_group(draw, policy_step=1, spread=1.0) for draw in range(4)], budget)


def moe(objective: str = "sapo", **sections: Any) -> Learner:
    return Learner(model_policy("moe", torch.float64), settings_of(objective, **sections), temperature=1.0)


def reported(learner: Learner, budget: int = 40) -> dict[str, float]:
    update = learner.step(batch(learner.settings, budget))
    return {name: groups["all"] for name, groups in update.diagnostics.items() if name.startswith("router_")}


def by_hand() -> dict[str, float]:
    """Sequence by sequence through the unhooked model, with the router's products written out."""
    policy = model_policy("moe", torch.float64)
    layers = policy.model.base_model.layers
    slots = [[0] * 5 for _ in layers]
    inputs: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda _, given, number=number: inputs.update({number: given[0]}))
    for microbatch in batch(settings_of()).microbatches:
        for ids in microbatch.input_ids.split(list(microbatch.lengths)):
            with torch.no_grad():
                policy.hidden(ids[None], torch.ones(1, len(ids), dtype=torch.bool))
            for number, layer in enumerate(layers):
                for token in inputs[number][0]:
                    logits = [float(token @ row) for row in layer.mlp.gate.weight.detach()]
                    for expert in sorted(range(5), key=lambda each: -logits[each])[:2]:
                        slots[number][expert] += 1
    loads = [[each * 5 / sum(layer) for each in layer] for layer in slots]
    spreads = [(sum((each - 1) ** 2 for each in layer) / 5) ** 0.5 for layer in loads]
    return {
        "router_load_max": max(max(layer) for layer in loads),
        "router_load_cv": sum(spreads) / len(spreads),
        "router_idle_experts": sum(each == 0 for layer in loads for each in layer) / 10,
    }


@pytest.mark.parametrize("budget", [40, 10**6])
def test_every_token_of_a_step_counts_once(budget: int) -> None:
    learner = moe()
    assert reported(learner, budget) == pytest.approx(by_hand())


def test_what_looks_ahead_and_layers_that_are_computed_again_do_not_count_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {}
    monkeypatch.setattr("sapo_learner.router_load.figures", lambda layers: found.update(layers=layers) or {})
    expected = sum(len(each.input_ids) for each in batch(settings_of()).microbatches) * 2
    again = ParallelSettings(activation_checkpointing=True)
    for learner in (
        learner_of("moe", torch.float64, ALONE, again),
        moe("grpo", proximal={"mode": "recompute"}),
    ):
        for _ in range(2):
            learner.step(batch(learner.settings))
            assert [int(layer.sum()) for layer in found["layers"]] == [expected, expected]


def test_a_rank_that_only_takes_part_counts_nothing_and_knows_the_routers() -> None:
    learner = moe()
    load = learner._router_load
    (one, *_) = batch(learner.settings).microbatches
    learner._take_part(idle_microbatch(one))
    assert {number: counts.tolist() for number, counts in load._counts.items()} == {0: [0] * 5, 1: [0] * 5}
    assert load.taken(ALONE) == {}


def test_hooks_change_no_weight() -> None:
    first, second = moe(), moe()
    second._router_load = RouterLoad(None)
    for layer in second.policy.model.base_model.layers:
        layer.mlp.gate._forward_hooks.clear()
    assert set(reported(first)) == NAMES
    assert reported(second) == {}
    for ours, theirs in zip(first.policy.tensors().values(), second.policy.tensors().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_dense_model_and_one_in_padded_rows_have_no_such_figures() -> None:
    assert reported(Learner(model_policy("dense", torch.float64), settings_of(), temperature=1.0)) == {}
    padded = model_policy("moe", torch.float64)
    padded.model.set_attn_implementation("eager")
    assert reported(Learner(padded, settings_of(), temperature=1.0)) == {}


def test_a_router_that_does_not_say_whom_it_chose_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = moe()
    for layer in learner.policy.model.base_model.layers:  # as if they gave nothing but logits
        for number, hook in list(layer.mlp.gate._forward_hooks.items()):
            layer.mlp.gate._forward_hooks[number] = lambda module, given, output, hook=hook: hook(
                module, given, output[:2]
            )
    assert reported(learner) == {}


def test_figures_of_a_layer_that_is_even_and_one_that_uses_a_single_expert() -> None:
    found = figures([torch.tensor([3, 3, 3, 3]), torch.tensor([8, 0, 0, 0])])
    assert found["router_load_max"] == {"all": 4.0}
    assert found["router_load_cv"] == {"all": pytest.approx((0 + 3**0.5) / 2)}
    assert found["router_idle_experts"] == {"all": 3 / 8}
