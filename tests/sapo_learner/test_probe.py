"""I4: the probe's numbers are those of the published weights, measuring them changes nothing, and its bounds hold."""

import json
import math

import numpy as np
import pytest
import torch

from sapo_learner.errors import ConfigError, Corrupt
from sapo_learner.manifest import Manifest, Probe
from sapo_learner.policy import Policy, tiny_policy
from sapo_learner.probe import MEAN_SIXTEEN_BIT, ProbeResult, compare, draw_sequence, measure
from sapo_learner.snapshot import weights_digest
from tests.recorded import ALPHABET

EXPECTED = (-1.0, -2.0, -3.0, -4.0)


@pytest.fixture
def policy() -> Policy:
    return tiny_policy(ALPHABET, seed=0)


def plain(policy: Policy, ids: tuple[int, ...]) -> list[float]:
    """Log-probs by the model's own forward pass and nothing of ours."""
    with torch.no_grad():
        logprobs = torch.log_softmax(policy.model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    return [float(logprobs[position, token]) for position, token in enumerate(ids[1:])]


# ---- the sequence


def test_the_sequence_is_the_run_s_and_of_ordinary_tokens(policy: Policy) -> None:
    sequence = draw_sequence(policy, seed=7)
    assert sequence == draw_sequence(tiny_policy(ALPHABET, seed=1), seed=7)
    assert sequence != draw_sequence(policy, seed=8)
    assert len(sequence) == 64
    ordinary = set(policy.tokenizer.convert_tokens_to_ids(list(ALPHABET)))
    assert set(sequence) <= ordinary
    assert len(set(sequence)) > len(ordinary) / 2


def test_the_sequence_leaves_room_for_one_token_in_a_short_context(policy: Policy) -> None:
    assert len(draw_sequence(policy, seed=7, context=20)) == 19
    policy.model.config.max_position_embeddings = 12
    assert len(draw_sequence(policy, seed=7, context=20)) == 11
    assert len(draw_sequence(policy, seed=7)) == 11


# ---- the numbers


def test_the_numbers_are_those_of_a_plain_forward_pass(policy: Policy) -> None:
    probe = measure(policy, policy.tensors(), draw_sequence(policy, seed=7))
    assert len(probe.logprobs) == 63
    assert probe.logprobs == pytest.approx(plain(policy, probe.token_ids), abs=1e-5)


def test_the_numbers_are_those_of_the_given_weights_and_not_of_the_policy_s_own(policy: Policy) -> None:
    """Tied ones included: the tiny policy's output projection is its embedding."""
    published = tiny_policy(ALPHABET, seed=1)
    sequence = draw_sequence(policy, seed=7)
    probe = measure(policy, published.tensors(), sequence)
    assert probe.logprobs == pytest.approx(plain(published, probe.token_ids), abs=1e-5)
    assert np.abs(np.subtract(probe.logprobs, measure(policy, policy.tensors(), sequence).logprobs)).max() > 0.01


def test_measuring_changes_nothing_that_training_depends_on(policy: Policy) -> None:
    parameters = list(policy.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    digest, state, drawn = weights_digest(policy.tensors()), torch.get_rng_state(), np.random.get_state()[1].tolist()
    measure(policy, tiny_policy_like(policy), draw_sequence(policy, seed=7))
    assert weights_digest(policy.tensors()) == digest
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == drawn
    assert all(now is before for now, before in zip(policy.model.parameters(), parameters, strict=True))
    assert all(bool((parameter.grad == 1).all()) for parameter in parameters)
    assert not policy.model.training


def tiny_policy_like(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in policy.tensors().items()}


def test_weights_without_finite_log_probs_give_no_probe(policy: Policy) -> None:
    """Finite weights may overflow on their way through the model."""
    tensors = {name: tensor * (3e38 if "norm" in name else 100) for name, tensor in policy.tensors().items()}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    with pytest.raises(Corrupt, match="not finite"):
        measure(policy, tensors, draw_sequence(policy, seed=7))


# ---- the manifest


def test_a_probe_in_a_manifest_is_checked_and_kept_exactly() -> None:
    probe = Probe(token_ids=(5, 6, 7), logprobs=(-0.1234567890123, -3.0))
    fields = {"step": 0, "digest": "0" * 64, "dtype": "float32", "tensors": {}, "parts": [], "files": {}}
    manifest = Manifest.model_validate(fields | {"probe": probe.model_dump()})
    assert Manifest.from_json(manifest.to_json()).probe == probe
    assert Manifest.from_json(json.dumps(fields)).probe is None  # of an older run directory
    for wrong in (
        {"token_ids": [5, 6], "logprobs": [-1.0, -1.0]},
        {"token_ids": [5], "logprobs": []},
        {"token_ids": [5, 6], "logprobs": [math.nan]},
        {"token_ids": [5, 6], "logprobs": [-math.inf]},
        {"token_ids": [5, -6], "logprobs": [-1.0]},
    ):
        with pytest.raises(ConfigError, match="probe"):
            Manifest.from_json(json.dumps(fields | {"probe": wrong}))


# ---- the bounds


def off_by(*differences: float, dtype: str) -> ProbeResult:
    return compare(EXPECTED, [value + each for value, each in zip(EXPECTED, differences, strict=True)], dtype)


def test_float32_is_bounded_at_every_token() -> None:
    result = off_by(0, 9e-5, -2e-5, 0, dtype="float32")
    assert result.ok
    assert (result.max_abs_difference, result.mean_abs_difference) == pytest.approx((9e-5, 2.75e-5))
    assert not off_by(0, 0, -1.1e-4, 0, dtype="float32").ok


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_bounded_in_the_mean_alone(dtype: str) -> None:
    """One token may be far off, where a mixture of experts routes it otherwise; all of them may not."""
    routed = off_by(0, 0.19, 0, 0, dtype=dtype)
    assert routed.ok
    assert routed.max_abs_difference == pytest.approx(0.19)
    assert off_by(*[MEAN_SIXTEEN_BIT * 0.99] * 4, dtype=dtype).ok
    assert not off_by(*[-MEAN_SIXTEEN_BIT * 1.01] * 4, dtype=dtype).ok


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_a_miss(dtype: str, odd: float) -> None:
    assert not off_by(0, 0, odd, 0, dtype=dtype).ok
