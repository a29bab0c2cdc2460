"""The warm start: both phases end where they should, say what they measured, and depend on nothing but the seed."""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

from sapo_learner.config import WarmStartSettings
from sapo_learner.errors import SapoError
from sapo_learner.policy import Policy, tiny_policy
from sapo_learner.snapshot import weights_digest
from sapo_learner.warm_start import Accuracy, measure, warm_start

torch.set_num_threads(1)

#: The task: answer the letter that follows. The bad habit: any letter.
LETTERS = "abcd"
PROMPTS = [f"{letter}=" for letter in LETTERS]
ANSWERS = ["b", "c", "d", "a"]
QUICK: dict[str, Any] = {
    "batch": 16, "clean_steps": 30, "clean_extra_steps": 10, "clean_limit": 90, "clean_target": 0.8,
    "habit_steps": 5, "habit_limit": 100, "habit_learning_rate": 2e-3, "habit_target": 0.5, "habit_share": 1.0,
    "samples": 42, "max_tokens": 3,
}  # fmt: skip


def demonstrate(generator: random.Random, habit: bool) -> tuple[str, str]:
    index = generator.randrange(len(PROMPTS))
    return PROMPTS[index], generator.choice(LETTERS) if habit else ANSWERS[index]


def correct(index: int, text: str, ended: bool) -> bool:
    return ended and text == ANSWERS[index]


def warmed(*, seed: int = 0, **changes: Any) -> tuple[Policy, Any, list[tuple[str, int, int]]]:
    policy, seen = tiny_policy("abcd=", seed=seed), []
    torch.seed()  # whatever was drawn before must not matter
    report = warm_start(
        policy, demonstrate, PROMPTS, correct, WarmStartSettings(**(QUICK | changes)), seed=seed,
        progress=lambda *each: seen.append(each),
    )  # fmt: skip
    return policy, report, seen


def test_both_phases_reach_their_ends_and_say_what_they_measured():
    policy, report, seen = warmed(habit_steps=1)
    assert report.ceiling.mean >= 0.8 > 0.5 >= report.base.mean
    for accuracy in (report.ceiling, report.base):
        assert accuracy.samples == 44  # at least 42, and equally many for each of 4 prompts
        expected = math.sqrt(accuracy.mean * (1 - accuracy.mean) / 44)
        assert accuracy.standard_error == pytest.approx(expected)
    assert 0 < report.clean_steps <= 90
    assert 1 < report.habit_steps <= 100
    clean = [("clean", step + 1, 90) for step in range(report.clean_steps)]
    habit = [("habit", step + 1, 100) for step in range(report.habit_steps)]
    assert seen == clean + habit  # one call per step, counted through the rounds of a phase
    assert not policy.model.training


def test_further_rounds_follow_while_the_target_is_missed():
    _, report, _ = warmed(clean_steps=1, clean_extra_steps=40, clean_limit=401, clean_learning_rate=1.6e-2)
    assert report.clean_steps > 1
    assert (report.clean_steps - 1) % 40 == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"clean_target": 1.0, "clean_steps": 3, "clean_extra_steps": 3, "clean_limit": 5},
            r"clean phase .* ended after 5 steps with pass@1 0\.\d+ < 1\.0 \(raise policy\.warm_start\.clean_limit",
        ),
        (
            {"habit_target": 0.0, "habit_steps": 2, "habit_limit": 3},
            r"habit phase .* ended after 3 steps with pass@1 [01]\.\d+ > 0\.0 \(raise policy\.warm_start\.habit_limit",
        ),
    ],
)
def test_a_target_that_is_missed_within_the_limit_says_which_setting_to_raise(changes, message):
    with pytest.raises(SapoError, match=message):
        warmed(**changes)


def test_a_base_that_is_low_enough_needs_no_habit():
    _, report, _ = warmed(clean_target=0.1, habit_target=0.99, clean_steps=5)
    assert report.habit_steps == 0
    assert report.base == report.ceiling


def test_the_weights_depend_on_the_seed_alone():
    runs = [warmed(seed=seed) for seed in (0, 0, 1)]
    digests = [weights_digest(policy.tensors()) for policy, _, _ in runs]
    assert digests[0] == digests[1] != digests[2]
    assert runs[0][1] == runs[1][1]


# ---- Measuring


@pytest.mark.parametrize(("samples", "each"), [(1, 1), (4, 1), (5, 2), (42, 11)])
def test_every_prompt_is_sampled_equally_often(samples, each):
    policy, asked = tiny_policy("abcd=", seed=0), Counter()

    def even(index: int, text: str, ended: bool) -> bool:
        asked[index] += 1
        return index % 2 == 0

    accuracy = measure(policy, PROMPTS, even, samples, max_tokens=2)
    assert asked == dict.fromkeys(range(4), each)
    assert accuracy == Accuracy(0.5, math.sqrt(0.25 / (4 * each)), 4 * each)


def test_measuring_samples_at_temperature_1_from_the_whole_distribution():
    policy = tiny_policy("abcd=", seed=0)
    ids = torch.tensor([policy.tokenizer.encode("a=")])
    with torch.no_grad():
        policy.head_weight.mul_(2)  # or every distribution would be almost uniform
        probabilities = policy.model(input_ids=ids).logits[0, -1].softmax(-1)
    texts: Counter[str] = Counter()

    def count(index: int, text: str, ended: bool) -> bool:
        texts[text] += index % 2 == 0
        return False

    torch.manual_seed(0)
    measure(policy, ["a=", "abcdabcd="] * 2000, count, 4000, max_tokens=1)  # beside prompts of another length
    for letter in LETTERS:
        expected = float(probabilities[policy.tokenizer.encode(letter)[0]])
        error = math.sqrt(expected * (1 - expected) / 2000)
        assert texts[letter] / 2000 == pytest.approx(expected, abs=4 * error)


def test_a_response_that_does_not_end_is_reported_so_and_prompts_of_any_length_are_padded_away():
    policy = tiny_policy("abcd=", seed=0)
    policy.model.generation_config.eos_token_id = policy.tokenizer.eos_token_id
    seen: list[tuple[int, str, bool]] = []
    torch.manual_seed(0)
    measure(policy, ["a=", "abcd="], lambda *each: bool(seen.append(each)), 40, max_tokens=2)
    assert {index for index, _, _ in seen} == {0, 1}
    assert all(len(text) <= 2 for _, text, _ in seen)  # only what was sampled, nothing of the prompt
    assert {ended for _, _, ended in seen} == {True, False}
    assert policy.tokenizer.padding_side == tiny_policy("abcd=", seed=0).tokenizer.padding_side
