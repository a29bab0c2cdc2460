"""Packing: what the model reads, what predicts what, and the counts that normalise a step."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_learner.advantages import group_advantages
from sapo_learner.aggregation import StepCounts
from sapo_learner.batching import Microbatch, TrainingBatch, collate
from sapo_learner.config import AdvantageSettings
from sapo_learner.trajectory import Trajectory, TrajectoryGroup
from tests.recorded import degenerate_group, group, random_group, response

torch.set_num_threads(1)


def packed(groups: Sequence[TrajectoryGroup], *, step: int = 0, budget: int = 10**6, **options) -> TrainingBatch:
    advantages = [group_advantages([each.reward for each in one.trajectories], AdvantageSettings()) for one in groups]
    return collate(groups, advantages, step=step, microbatch_tokens=budget, **options)


def responses_in(microbatch: Microbatch) -> list[dict[str, list[float]]]:
    """Per response, read back through `predictor`: the prompt, and every packed vector of its own."""
    ends = list(accumulate(microbatch.lengths))
    assert microbatch.input_ids.shape == (ends[-1],)
    ids_of = dict(enumerate(microbatch.input_ids.split(microbatch.lengths)))
    found = []
    for sequence_id in microbatch.sequence_ids.unique_consecutive():
        mine = microbatch.sequence_ids == sequence_id
        positions = microbatch.predictor[mine].tolist()
        assert positions == list(range(positions[0], positions[0] + len(positions)))
        index = bisect_right(ends, positions[0])
        start = ends[index] - microbatch.lengths[index]
        assert positions[-1] == ends[index] - 2  # nothing is predicted behind the last token
        ids, first = ids_of.pop(index).tolist(), positions[0] - start
        assert ids[first + 1 :] == microbatch.targets[mine].tolist()  # a position predicts the token after it
        names = ("targets", "behaviour_logprobs", "advantages", "loss_mask", "policy_age")
        vectors = {name: getattr(microbatch, name)[mine].tolist() for name in names}
        found.append({"prompt": ids[: first + 1], **vectors})
    assert not ids_of
    return found


def recorded(one: TrajectoryGroup, trajectory: Trajectory, advantage: float, step: int) -> dict[str, list[float]]:
    """What `responses_in` must give for a response."""
    return {
        "prompt": one.prompt_ids.tolist(),
        "targets": trajectory.token_ids.tolist(),
        "behaviour_logprobs": trajectory.behaviour_logprobs.tolist(),
        "advantages": [advantage] * len(trajectory.token_ids),
        "loss_mask": trajectory.loss_mask.tolist(),
        "policy_age": (step - trajectory.token_steps()).tolist(),
    }


@settings(max_examples=30, deadline=None)
@given(draws=st.lists(st.integers(0, 50), min_size=1, max_size=5, unique=True), budget=st.integers(1, 120))
def test_every_response_is_packed_once_whole_and_unchanged(draws, budget):
    groups = [random_group(draw, policy_step=3) for draw in draws]
    batch = packed(groups, step=7, budget=budget)
    expected = []
    for one in groups:
        advantages = group_advantages([each.reward for each in one.trajectories], AdvantageSettings()).tolist()
        expected += [recorded(one, each, a, 7) for each, a in zip(one.trajectories, advantages, strict=True)]
    found = [each for microbatch in batch.microbatches for each in responses_in(microbatch)]
    assert sorted(found, key=repr) == sorted(expected, key=repr)
    ids = torch.cat([microbatch.sequence_ids.unique() for microbatch in batch.microbatches])
    assert len(ids.unique()) == len(ids) == len(expected)  # no response is in two microbatches, no id means two


@settings(max_examples=30, deadline=None)
@given(draws=st.lists(st.integers(0, 50), min_size=1, max_size=5, unique=True), budget=st.integers(1, 120))
def test_a_microbatch_keeps_its_budget_unless_it_is_one_long_response(draws, budget):
    batch = packed([random_group(draw) for draw in draws], budget=budget)
    for microbatch in batch.microbatches:
        assert sum(microbatch.lengths) <= budget or len(microbatch.lengths) == 1
        assert list(microbatch.lengths) == sorted(microbatch.lengths, reverse=True)  # so that equal ones are together


def of_lengths(lengths: Sequence[int]) -> TrajectoryGroup:
    """A group whose sequences, with the prompt, have these many tokens."""
    return group([response([5] * (n - 1), reward=i % 2) for i, n in enumerate(lengths)], prompt_ids=[4])


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(2, 60), min_size=2, max_size=40), budget=st.integers(60, 500))
def test_microbatches_are_few_and_about_equally_full(lengths, budget):
    batch = packed([of_lengths(lengths)], budget=budget)
    sizes = [sum(each.lengths) for each in batch.microbatches]
    assert sum(sizes) == sum(lengths)
    assert max(sizes) - min(sizes) <= max(lengths)
    assert len(sizes) <= 1 + 2 * sum(lengths) // budget


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([5, 4, 3, 3, 2, 2], 10, [(5, 3, 2), (4, 3, 2)]),  # the longest first, each to where least is so far
        ([5, 5, 2, 2, 2], 8, [(5,), (5,), (2, 2, 2)]),  # two would do by their sum alone
        ([9, 3, 3, 2], 4, [(9,), (3,), (3,), (2,)]),
        ([9, 2, 2], 4, [(9,), (2, 2)]),
        ([4, 4, 4], 4, [(4,), (4,), (4,)]),
        ([4, 3, 2], 10**6, [(4, 3, 2)]),
    ],
)
def test_packing_by_hand(lengths, budget, expected):
    batch = packed([of_lengths(lengths)], budget=budget)
    assert [each.lengths for each in batch.microbatches] == expected


def test_the_last_prompt_token_predicts_the_first_response_token_by_hand():
    one = group([response([7, 8], reward=1.0), response([9], reward=0.0)], prompt_ids=[4, 13, 5])
    (microbatch,) = packed([one]).microbatches
    assert microbatch.input_ids.tolist() == [4, 13, 5, 7, 8, 4, 13, 5, 9]
    assert microbatch.lengths == (5, 4)
    assert microbatch.predictor.tolist() == [2, 3, 5 + 2]
    assert microbatch.targets.tolist() == [7, 8, 9]
    assert microbatch.advantages.tolist() == pytest.approx([1, 1, -1], rel=1e-5)


def test_age_is_counted_per_token_from_this_step():
    one = group([response([7, 8, 9], reward=1.0, steps=[3, 3, 5]), response([9], reward=0.0, steps=5)])
    (microbatch,) = packed([one], step=5).microbatches
    assert microbatch.policy_age.tolist() == [2, 2, 0, 0]


def test_masked_tokens_are_context_but_do_not_count():
    tool = response([7, 8, 9, 10], reward=1.0, mask=[True, False, False, True])
    batch = packed([group([tool, response([5], reward=0.0)])])
    (microbatch,) = batch.microbatches
    assert microbatch.input_ids[:7].tolist() == [4, 13, 5, 7, 8, 9, 10]
    assert microbatch.loss_mask.tolist() == [True, False, False, True, True]
    assert batch.counts == StepCounts(sequences=2, tokens=3)


def test_a_response_without_a_sampled_token_is_neither_packed_nor_counted():
    silent = response([7, 8], reward=1.0, mask=[False, False])
    batch = packed([group([silent, response([5], reward=0.0), response([6, 6], reward=0.5)])])
    assert [len(each.lengths) for each in batch.microbatches] == [2]
    assert batch.counts == StepCounts(sequences=2, tokens=3)


@pytest.mark.parametrize(("normalise_by", "sequences", "tokens"), [("step", 4, 2 + 6), ("signal", 2, 2)])
def test_groups_without_signal_are_not_packed_and_count_only_under_step(normalise_by, sequences, tokens):
    signal = group([response([5], reward=1.0), response([6], reward=0.0)], draw=1)
    batch = packed([degenerate_group(0), signal], normalise_by=normalise_by)
    assert batch.signal == (False, True)
    assert batch.counts == StepCounts(sequences=sequences, tokens=tokens)
    assert [each.targets.tolist() for each in batch.microbatches] == [[5, 6]]


def test_a_group_whose_advantages_fall_on_masked_responses_has_no_signal():
    unsampled = [response([7], reward=reward, mask=[False]) for reward in (0.0, 1.0)]
    batch = packed([group([*unsampled, response([5], reward=0.5)])])
    assert batch.signal == (False,)
    assert batch.microbatches == ()
    assert batch.counts == StepCounts(sequences=1, tokens=1)


def test_nothing_to_pack_gives_no_microbatch():
    assert packed([]) == TrainingBatch((), StepCounts(0, 0), (), ())
    assert packed([degenerate_group(0)]).microbatches == ()


def test_the_order_of_groups_changes_neither_counts_nor_content():
    groups = [random_group(draw) for draw in range(4)]
    forward, backward = packed(groups, budget=60), packed(groups[::-1], budget=60)
    assert forward.counts == backward.counts
    contents = [
        sorted(repr(each) for microbatch in batch.microbatches for each in responses_in(microbatch))
        for batch in (forward, backward)
    ]
    assert contents[0] == contents[1]


def test_advantages_of_every_group_must_be_given():
    with pytest.raises(ValueError, match="zip"):
        collate([random_group(0)], [], step=0, microbatch_tokens=10)
