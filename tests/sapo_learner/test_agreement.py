"""Recomputed log-probs, and statistics that tell honest sampling from what is not."""

import numpy as np
import pytest
import torch

from sapo_learner.agreement import Tail, TokenTable, by_position, gates, odd_tail, recompute, spread, tails
from sapo_learner.objectives import build
from sapo_learner.policy import tiny_policy
from tests.recorded import ALPHABET


def table(rows: np.ndarray, chosen: np.ndarray, **columns: np.ndarray) -> TokenTable:
    """rows: [N, V] probabilities, chosen: [N] the tokens drawn; recorded exactly, in one response."""
    count, own = len(rows), np.take_along_axis(rows, chosen[:, None], 1)[:, 0]
    before = np.where(rows > own[:, None], rows, 0).sum(1)
    defaults = {
        "recorded": np.log(own), "logprobs": np.log(own), "raw": np.log(own), "before": before, "peak": rows.max(1),
        "first": np.log(own), "version": np.zeros(count, np.int64), "position": np.arange(count),
        "changed": np.zeros(count, bool), "recurring": np.zeros(count, bool),
        "response": np.zeros(count, np.int64), "advantage": np.ones(count),
    }  # fmt: skip
    return TokenTable(**(defaults | columns))


def draw(rows: np.ndarray, seed: int) -> np.ndarray:
    uniform = np.random.default_rng(seed).random((len(rows), 1))
    return np.minimum((rows.cumsum(1) < uniform).sum(1), rows.shape[1] - 1)


def contexts(count: int, *, temperature: float = 1.0, seed: int = 0) -> np.ndarray:
    """[N, 50] distributions between nearly decided and nearly flat."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(count, 50)) * generator.uniform(0.2, 6, size=(count, 1)) / temperature
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def cut(rows: np.ndarray, top_p: float) -> np.ndarray:
    order = np.argsort(-rows, axis=1)
    ordered = np.take_along_axis(rows, order, 1)
    kept = np.zeros_like(rows)
    np.put_along_axis(kept, order, np.where(ordered.cumsum(1) - ordered < top_p, ordered, 0), 1)
    return kept / kept.sum(1, keepdims=True)


def test_recomputed_numbers_are_those_of_the_whole_distribution() -> None:
    policy, prompt, tokens = tiny_policy(ALPHABET, seed=1), np.array([3, 4], np.int32), np.array([5, 6, 5], np.int32)
    found = recompute(policy, prompt, tokens, 0.7, chunk=2)
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([[3, 4, 5, 6, 5]])).logits[0, 1:-1].double()
    rows, own = (logits / 0.7).softmax(-1).numpy(), tokens[:, None]
    probability = np.take_along_axis(rows, own, 1)
    np.testing.assert_allclose(found.logprobs, np.log(probability)[:, 0], atol=1e-5)
    raw = np.take_along_axis(logits.log_softmax(-1).numpy(), own, 1)[:, 0]
    np.testing.assert_allclose(found.raw, raw, atol=1e-5)
    np.testing.assert_allclose(found.before, np.where(rows > probability, rows, 0).sum(1), atol=1e-5)
    np.testing.assert_allclose(found.peak, rows.max(1), atol=1e-5)


def test_tokens_that_are_equally_likely_rank_by_their_number() -> None:
    policy = tiny_policy(ALPHABET, seed=1)
    with torch.no_grad():
        policy.head_weight.zero_()
    tokens = np.arange(policy.vocabulary, dtype=np.int32)
    found = recompute(policy, np.array([3], np.int32), tokens, 1.0)
    np.testing.assert_allclose(found.before, tokens / policy.vocabulary, atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_honest_sampling_is_never_accused(seed: int) -> None:
    rows = contexts(5000, seed=seed)
    assert odd_tail(tails(table(rows, draw(rows, seed + 100)), seed)) is None


@pytest.mark.parametrize("top_p", [0.5, 0.8, 0.9, 0.95])
def test_truncated_sampling_leaves_a_tail_empty(top_p: float) -> None:
    rows = contexts(10000)
    odd = odd_tail(tails(table(rows, draw(cut(rows, top_p), 1))))
    assert odd is not None
    assert odd.share < 0.7


def test_contexts_that_are_decided_do_not_hide_a_truncated_tail() -> None:
    decided = np.array([[0.9995] + [0.0005 / 49] * 49] * 20000)
    rows = np.concatenate([contexts(4000), decided])
    odd = odd_tail(tails(table(rows, draw(cut(rows, 0.9), 1))))
    assert odd is not None
    assert odd.threshold == 0.9


def test_a_flatter_distribution_than_was_recorded_fills_the_tail() -> None:
    odd = odd_tail(tails(table(contexts(5000, temperature=0.5), draw(contexts(5000), 1))))
    assert odd is not None
    assert odd.share > 1.5


def test_a_few_tokens_accuse_nobody() -> None:
    assert odd_tail([Tail(0.9, 0, 20.0)]) is None, "e^-20 is rare, but not impossible"
    assert odd_tail([Tail(0.9, 0, 30.0)]) is not None
    assert odd_tail([Tail(0.9, 80000, 100000.0)]) is None, "impossible, but small enough to be arithmetic"


def test_differences_by_position_and_their_quantiles() -> None:
    rows = contexts(100)
    wrong = table(rows, draw(rows, 1))
    wrong.recorded[64:] += 0.5
    found = by_position(wrong)
    assert {name: each["tokens"] for name, each in found.items()} == {
        "first token": 1, "1-15": 15, "16-63": 48, "64+": 36
    }  # fmt: skip
    assert found["16-63"]["max"] == 0
    assert found["64+"]["p50"] == pytest.approx(0.5)
    assert spread(np.array([])) == {"tokens": 0}


def test_the_gate_is_the_objectives_own() -> None:
    rows = contexts(2)
    wrong = table(rows, draw(rows, 1))
    wrong.recorded[1] -= np.log(2)
    found = gates(wrong, build("sapo", tau_pos=1.0))
    expected = 1 / np.cosh(0.5) ** 2  # sech^2(tau (r - 1) / 2) at r = 2
    assert found == pytest.approx({"min": expected, "mean": (1 + expected) / 2})
    assert gates(wrong, build("grpo")) is None


def test_drift_is_how_far_later_versions_are_from_the_first() -> None:
    rows = contexts(4)
    moved = table(rows, draw(rows, 1), version=np.array([3, 3, 4, 4]))
    moved.first[:] = moved.logprobs + np.array([9, 9, -0.2, 0.4])
    assert moved.drift == pytest.approx(0.3)
    assert moved.updated.tolist() == [False, False, True, True]
