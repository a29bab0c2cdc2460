"""Weights per token: the denominators, and invariant I8 (however a step is split, the gradient is the same)."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapo_learner.aggregation import Mode, StepCounts, count, token_weights
from sapo_learner.objectives import Tokens, available, build

torch.set_num_threads(1)
quick = settings(max_examples=40, deadline=None)
MODES: list[tuple[Mode, int | None]] = [("sequence_mean", None), ("token_mean", None), ("constant", 7)]
every_mode = pytest.mark.parametrize(("mode", "length"), MODES)

#: One response as the mask of its tokens; wholly masked ones happen too.
masks = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=6)


def step_of(masks: list[list[bool]], seed: int = 0) -> Tokens:
    """A step of responses with these masks and random numbers on them."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor(list(itertools.chain(*masks)), dtype=torch.bool)
    lengths = torch.tensor([len(each) for each in masks])
    behaviour = -3 * torch.rand(len(mask), generator=generator, dtype=torch.float64)
    drift = 0.3 * torch.randn(len(mask), generator=generator, dtype=torch.float64)
    return Tokens(
        logprobs=behaviour + drift,
        behaviour_logprobs=behaviour,
        advantages=torch.randn(len(masks), generator=generator, dtype=torch.float64).repeat_interleave(lengths),
        loss_mask=mask,
        sequence_ids=torch.randperm(100, generator=generator)[: len(masks)].repeat_interleave(lengths),
        entropy=3 * torch.rand(len(mask), generator=generator, dtype=torch.float64),
    )


def pick(tokens: Tokens, where: Tensor) -> Tokens:
    """The tokens at `where`, in its order, as a microbatch of their own."""
    return Tokens(**{name: value[where] for name, value in vars(tokens).items() if value is not None})


def gradient_of(objective: str, tokens: Tokens, *args: Any, **kwargs: Any) -> tuple[float, Tensor]:
    leaf = Tokens(**(vars(tokens) | {"logprobs": tokens.logprobs.detach().requires_grad_()}))
    loss = (token_weights(leaf, *args, **kwargs) * build(objective)(leaf).loss).sum()
    (gradient,) = torch.autograd.grad(loss, leaf.logprobs)
    return loss.item(), gradient


# ---- The denominators ----------------------------------------------------------------------------------------------

EXAMPLE = [[True, True, False, True], [False, True], [False, False]]  # |y| = 3, 1, 0; N = 2


@pytest.mark.parametrize(
    ("mode", "length", "expected"),
    [
        ("sequence_mean", None, [1 / 6, 1 / 6, 0, 1 / 6, 0, 1 / 2, 0, 0]),
        ("token_mean", None, [1 / 4, 1 / 4, 0, 1 / 4, 0, 1 / 4, 0, 0]),
        ("constant", 8, [1 / 16, 1 / 16, 0, 1 / 16, 0, 1 / 16, 0, 0]),
    ],
)
def test_weights_by_hand(mode: Mode, length: int | None, expected: list[float]) -> None:
    tokens = step_of(EXAMPLE)
    assert count(tokens.loss_mask, tokens.sequence_ids) == StepCounts(sequences=2, tokens=4)
    assert token_weights(tokens, mode, length=length).tolist() == pytest.approx(expected, abs=1e-16)


def test_weights_use_the_counts_of_the_step() -> None:
    tokens, counts = step_of(EXAMPLE), StepCounts(sequences=20, tokens=40)
    for mode, length in MODES:
        whole, part = token_weights(tokens, mode, length=length), token_weights(tokens, mode, counts, length=length)
        torch.testing.assert_close(part, whole / 10, rtol=1e-15, atol=0)


@quick
@given(masks=masks)
def test_means_sum_to_one(masks: list[list[bool]]) -> None:
    tokens = step_of(masks)
    for mode in ("sequence_mean", "token_mean"):
        expected = 1.0 if tokens.loss_mask.any() else 0.0
        assert token_weights(tokens, mode).sum().item() == pytest.approx(expected, abs=1e-14)


@every_mode
@quick
@given(masks=masks, where=st.integers(0, 100))
def test_masking_a_token_raises_no_other_responses_weight(
    mode: Mode, length: int | None, masks: list[list[bool]], where: int
) -> None:
    """Within the counts of the step: only the masked token's own response may change, and only under its own mean."""
    tokens = step_of(masks)
    where %= len(tokens.loss_mask)
    counts = count(tokens.loss_mask, tokens.sequence_ids)
    before = token_weights(tokens, mode, counts, length=length)
    mask = tokens.loss_mask.clone()
    mask[where] = False
    after = token_weights(Tokens(**(vars(tokens) | {"loss_mask": mask})), mode, counts, length=length)
    assert after[where] == 0
    others = tokens.sequence_ids != tokens.sequence_ids[where]
    assert torch.equal(after[others], before[others])


def test_dtype_and_refusals() -> None:
    tokens = step_of(EXAMPLE)
    half = Tokens(**(vars(tokens) | {"logprobs": tokens.logprobs.bfloat16()}))
    assert token_weights(half, "sequence_mean").dtype == torch.float32
    assert token_weights(tokens, "sequence_mean").dtype == torch.float64
    for mode, length in [("constant", None), ("constant", 0), ("token_mean", 5), ("batch_mean", None)]:
        with pytest.raises(ValueError, match=mode):
            token_weights(tokens, mode, length=length)


# ---- Splitting, repeating ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", available())
@every_mode
@quick
@given(masks=masks, parts=st.integers(1, 4), order=st.randoms(use_true_random=False))
def test_microbatches_with_the_counts_of_the_step_add_up(
    mode: Mode, length: int | None, objective: str, masks: list[list[bool]], parts: int, order: Any
) -> None:
    """I8: responses dealt to microbatches at random, in any order; losses and gradients are summed."""
    tokens = step_of(masks)
    whole, gradient = gradient_of(objective, tokens, mode, length=length)
    dealt = [order.randrange(parts) for _ in masks]
    part_of = torch.tensor(dealt).repeat_interleave(torch.tensor([len(each) for each in masks]))
    places = [torch.nonzero(part_of == part).squeeze(1) for part in set(dealt)]
    micro = [pick(tokens, place) for place in places]
    counts = sum((count(each.loss_mask, each.sequence_ids) for each in micro), StepCounts(0, 0))
    assert counts == count(tokens.loss_mask, tokens.sequence_ids)
    total, added = 0.0, torch.zeros_like(gradient)
    for each, place in zip(micro, places, strict=True):
        loss, added[place] = gradient_of(objective, each, mode, counts, length=length)
        total += loss
    assert total == pytest.approx(whole, rel=0, abs=1e-12)
    torch.testing.assert_close(added, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", available())
@every_mode
def test_duplicating_the_step_changes_no_mean(mode: Mode, length: int | None, objective: str) -> None:
    """T9: twice the responses, half the weight of each."""
    tokens = step_of(EXAMPLE)
    twice = pick(tokens, torch.arange(len(tokens.logprobs)).repeat(2))
    ids = torch.cat([tokens.sequence_ids, tokens.sequence_ids + 1000])
    once, gradient = gradient_of(objective, tokens, mode, length=length)
    value, doubled = gradient_of(objective, Tokens(**(vars(twice) | {"sequence_ids": ids})), mode, length=length)
    assert value == pytest.approx(once, rel=1e-12)
    torch.testing.assert_close(doubled, torch.cat([gradient, gradient]) / 2, rtol=1e-12, atol=1e-15)


#: Under these a token's own loss depends on how many tokens come before it or are there, or on quantiles over them.
LENGTH_MATTERS = {"aspo", "cppo", "espo", "minpro", "vespo"}


@pytest.mark.parametrize("objective", sorted(set(available()) - LENGTH_MATTERS))
def test_t10_only_sequence_mean_ignores_the_length_of_a_response(objective: str) -> None:
    """Each token of the first response twice: a longer response that says the same."""
    tokens = step_of([[True] * 3, [True] * 4])
    places = torch.tensor([0, 0, 1, 1, 2, 2, 3, 4, 5, 6])
    values = {
        mode: [gradient_of(objective, each, mode)[0] for each in (tokens, pick(tokens, places))]
        for mode in ("sequence_mean", "token_mean")
    }
    assert values["sequence_mean"][1] == pytest.approx(values["sequence_mean"][0], rel=1e-12)
    assert values["token_mean"][1] != pytest.approx(values["token_mean"][0], rel=1e-3)
