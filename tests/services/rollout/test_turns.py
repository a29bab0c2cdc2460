"""Responses of several turns: what the policy sampled, what the task said, token by token, and what trains on them."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sapo_learner.advantages import group_advantages
from sapo_learner.batching import collate
from sapo_learner.config import LearnerSettings
from sapo_learner.errors import ConfigError
from sapo_learner.learner import Learner
from sapo_learner.policy import Policy, tiny_policy
from sapo_learner.trajectory import Trajectory, TrajectoryGroup, VersionSpan
from services.rollout.engines import PolicyVersion, Sampled, SampleRequest, TokenDelta
from services.rollout.engines.torch_engine import TorchEngine
from services.rollout.responder import Responder
from services.rollout.scoring import Scorer
from services.rollout.worker import _trajectory
from services.runtime.metrics import RolloutMetrics
from services.runtime.settings import RunConfig
from services.tasks import Message, Prompt, Response
from services.tasks.arithmetic import Arithmetic
from services.tasks.calculator import Calculator

ALPHABET = Calculator.alphabet
PROMPT = Prompt(id="p", content="7+5-3=", answer="9")
GROUP = 6

torch.set_num_threads(1)


class Talker(Arithmetic):
    """Says `says` after every turn, up to so many; right is what has an even number of characters."""

    says: str = "12;"
    times: int = 2
    breaks: bool = False

    def reply(self, prompt: Prompt, turns: Sequence[str]) -> str | None:
        if self.breaks:
            raise ZeroDivisionError
        return self.says if len(turns) <= self.times else None

    def score(self, prompt: Prompt, response: Response) -> dict[str, float]:
        return {"correct": float(len(response.text) % 2), "turns": float(len(response.turns))}


class Recorded(TorchEngine):
    """Keeps what it was asked and what it gave; `before`: called before each request, with its number."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy, PolicyVersion(0, 0), slots=GROUP)
        self.asked: list[tuple[list[int], list[int], list[float]]] = []
        self.before: Callable[[int], Any] | None = None

    async def generate(self, request: SampleRequest) -> AsyncIterator[TokenDelta]:
        if self.before:
            await self.before(len(self.asked))
        ids: list[int] = []
        logprobs: list[float] = []
        self.asked.append((list(request.prompt_ids), ids, logprobs))
        async for delta in super().generate(request):
            ids += delta.token_ids
            logprobs += delta.logprobs
            yield delta


class Scene:
    def __init__(self, task: Talker, *, max_tokens: int = 150, max_turns: int = 8) -> None:
        self.config = RunConfig.model_validate(
            {"sampling": {"group_size": GROUP, "max_tokens": max_tokens}, "scoring": {"max_turns": max_turns}}
        )
        self.policy = tiny_policy(ALPHABET, seed=0)
        self.tokenizer, self.engine, self.metrics = self.policy.tokenizer, Recorded(self.policy), RolloutMetrics()
        self.scorer = Scorer(self.config.mixture, self.config.scoring, self.metrics)
        self.scorer.tasks["arithmetic"] = task
        self.responder = Responder(self.engine, self.tokenizer, self.scorer, self.config, self.metrics)

    async def respond(self, count: int = 1, seed: int = 3) -> list[Sampled]:
        return await self.responder.respond("arithmetic", PROMPT, seed, count)

    async def ending(self, turns: int) -> Sampled:
        """A response of that many turns of its own."""
        for seed in range(100):
            self.engine.asked.clear()
            (sampled,) = await self.respond(seed=seed)
            if len(self.engine.asked) == turns and sampled.finish_reason == "stop":
                return sampled
        raise AssertionError("no seed gives one")

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


@pytest.fixture
async def made() -> AsyncIterator[Callable[..., Scene]]:
    scenes: list[Scene] = []

    def make(*, max_tokens: int = 150, max_turns: int = 8, **task: Any) -> Scene:
        scenes.append(Scene(Talker(**task), max_tokens=max_tokens, max_turns=max_turns))
        return scenes[-1]

    yield make
    for scene in scenes:
        await scene.engine.close()


async def test_every_token_of_three_turns_is_what_it_says_it_is(made: Callable[..., Scene]) -> None:
    scene = made()
    sampled = await scene.ending(turns=3)
    reply, prompt_ids = scene.ids("12;"), scene.ids(PROMPT.text)
    (first, one, a), (second, two, b), (third, three, c) = scene.engine.asked
    # What the engine was asked each time is all that there was before, id by id.
    assert first == prompt_ids
    assert second == prompt_ids + one + reply
    assert third == prompt_ids + one + reply + two + reply
    assert sampled.token_ids == one + reply + two + reply + three
    assert sampled.turns == [one, two, three]
    assert all(turn[-1] == scene.tokenizer.eos_token_id for turn in (one, two, three))
    assert sampled.loss_mask == [True] * len(one) + [False] * 3 + [True] * len(two) + [False] * 3 + [True] * len(three)
    assert sampled.logprobs == [*a, 0.0, 0.0, 0.0, *b, 0.0, 0.0, 0.0, *c]
    truth = await scene.engine.score(prompt_ids, sampled.token_ids)
    for own, recorded, expected in zip(sampled.loss_mask, sampled.logprobs, truth, strict=True):
        assert recorded == (pytest.approx(expected, abs=1e-5) if own else 0.0)
        assert expected < -0.01  # a log-prob of 0 is not that of any token here
    assert sampled.spans == [VersionSpan(len(sampled.token_ids), 0, 0)]


async def test_a_prompt_that_cannot_be_encoded_is_named_with_its_task(made: Callable[..., Scene]) -> None:
    chat = Prompt(id="d", content=(Message(role="user", content="7+5"),))
    with pytest.raises(ConfigError, match=r"^task arithmetic, prompt d: the prompt is a chat"):
        await made().responder.respond("arithmetic", chat, 3, 1)


async def test_nothing_is_tokenised_again(made: Callable[..., Scene]) -> None:
    """A random policy samples <unk> and <pad>, which a text does not give back."""
    scene = made()
    lost = 0
    for sampled in await scene.respond(count=GROUP):
        again = scene.ids(scene.tokenizer.decode(sampled.token_ids, skip_special_tokens=True))
        lost += again != [each for each in sampled.token_ids if each != scene.tokenizer.eos_token_id]
    assert lost
    asked = {tuple(prompt) for prompt, _, _ in scene.engine.asked}
    prompt_ids = scene.ids(PROMPT.text)
    for prompt, ids, _ in scene.engine.asked:
        if ids[-1] == scene.tokenizer.eos_token_id and (*prompt, *ids, *scene.ids("12;")) in asked:
            break
    else:
        raise AssertionError("no second turn")
    assert all(list(each[: len(prompt_ids)]) == prompt_ids for each in asked)


async def test_weights_that_change_between_two_turns_divide_the_spans_there(made: Callable[..., Scene]) -> None:
    scene = made(times=1)
    other = tiny_policy(ALPHABET, seed=1)

    async def update(number: int) -> None:
        if number == 1:
            await scene.engine.update_weights(other.tensors(), PolicyVersion(4, 2))

    scene.engine.before = update
    for seed in range(100):
        scene.engine.asked.clear()
        await scene.engine.update_weights(tiny_policy(ALPHABET, seed=0).tensors(), PolicyVersion(0, 0))
        (sampled,) = await scene.respond(seed=seed)
        if len(scene.engine.asked) == 2:
            break
    (_, one, _), (_, two, _) = scene.engine.asked
    told = len(one) + 3  # the reply has no policy; it counts to the one before
    assert sampled.spans == [VersionSpan(told, 0, 0), VersionSpan(len(two), 4, 2)]
    after = await scene.engine.score(scene.ids(PROMPT.text), sampled.token_ids)
    assert sampled.logprobs[told:] == pytest.approx(after[told:], abs=1e-5)
    assert sampled.logprobs[: len(one)] != pytest.approx(after[: len(one)], abs=1e-3)
    await scene.engine.update_weights(tiny_policy(ALPHABET, seed=0).tensors(), PolicyVersion(5, 3))
    before = await scene.engine.score(scene.ids(PROMPT.text), sampled.token_ids)
    assert sampled.logprobs[: len(one)] == pytest.approx(before[: len(one)], abs=1e-5)


async def test_without_room_for_a_reply_and_a_token_the_response_was_cut_off(made: Callable[..., Scene]) -> None:
    whole = await made(times=0).ending(turns=1)
    length = len(whole.token_ids)
    for room, turns in ((length + 3, 1), (length + 4, 2)):
        scene = made(max_tokens=room)
        for seed in range(100):
            scene.engine.asked.clear()
            (sampled,) = await scene.respond(seed=seed)
            if sampled.token_ids[:length] == whole.token_ids:
                break
        assert sampled.token_ids[:length] == whole.token_ids
        assert (len(scene.engine.asked), sampled.finish_reason) == (turns, "length")
        assert len(sampled.token_ids) == (length if turns == 1 else room)
        assert len(sampled.loss_mask) == len(sampled.logprobs) == len(sampled.token_ids)


@pytest.mark.parametrize(("options", "turns"), [({"max_turns": 2}, 2), ({"max_turns": 1}, 1), ({"times": 0}, 1)])
async def test_a_response_is_over_at_its_last_turn_or_when_the_task_says_nothing(
    made: Callable[..., Scene], options: dict[str, int], turns: int
) -> None:
    scene = made(**options)
    sampled = await scene.ending(turns=turns)
    assert sampled.finish_reason == "stop"
    assert sampled.loss_mask[-1]
    assert len(sampled.turns) == turns


async def test_a_turn_that_was_cut_off_gets_no_reply(made: Callable[..., Scene]) -> None:
    scene = made(max_tokens=2)
    cut = [each for each in await scene.respond(count=GROUP) if each.finish_reason == "length"]
    assert cut
    assert all(each.loss_mask == [True, True] for each in cut)


async def test_a_reply_that_fails_ends_the_response_and_is_counted(made: Callable[..., Scene]) -> None:
    scene = made(breaks=True)
    sampled = await scene.ending(turns=1)
    assert all(sampled.loss_mask)
    assert sampled.failed
    (rewards,) = await scene.responder.rewards("arithmetic", PROMPT, [sampled])
    assert set(rewards.values()) == {scene.config.scoring.on_error}, "not what its first turn alone would be worth"
    found = scene.metrics.registry.get_sample_value(
        "sapo_rollout_scoring_failures_total", {"task": "arithmetic", "reason": "exception"}
    )
    assert found


async def test_the_score_sees_the_text_and_the_policys_own_turns(made: Callable[..., Scene]) -> None:
    scene = made()
    seen: list[Response] = []

    class Seen(Talker):
        def score(self, prompt: Prompt, response: Response) -> dict[str, float]:
            seen.append(response)
            return {"correct": 1.0}

    sampled = await scene.ending(turns=3)
    scene.scorer.tasks["arithmetic"] = Seen()
    await scene.responder.rewards("arithmetic", PROMPT, [sampled])
    (response,) = seen
    assert len(response.turns) == 3
    assert response.text == "12;".join(response.turns)
    assert response.final == response.turns[-1]


# ---- training


async def groups(scene: Scene) -> list[TrajectoryGroup]:
    made = []
    for draw in range(3):
        sampled = await scene.respond(count=GROUP, seed=draw)
        rewards = await scene.responder.rewards("arithmetic", PROMPT, sampled)
        made.append(
            TrajectoryGroup(
                draw=draw, attempt=1, task="arithmetic", prompt_id="p", epoch=0, seed=draw,
                prompt_ids=np.array(scene.ids(PROMPT.text), np.int32),
                trajectories=tuple(_trajectory(*each) for each in zip(sampled, rewards, strict=True)),
                sampling=scene.config.sampling.parameters(), engine="torch",
            )
        )  # fmt: skip
    return made


def naive_loss(policy: Policy, made: Sequence[TrajectoryGroup], chosen: Callable[[Trajectory], Any]) -> Tensor:
    """arXiv 2511.20347, Eq. 5 and 6, negated: a response at a time, a token at a time, those of `chosen` alone."""
    losses = []
    for group in made:
        advantages = group_advantages([each.reward for each in group.trajectories], SETTINGS.advantages)
        for each, advantage in zip(group.trajectories, advantages, strict=True):
            ids = torch.tensor([*group.prompt_ids.tolist(), *each.token_ids.tolist()])
            logprobs = torch.log_softmax(policy.model(input_ids=ids[None]).logits[0].double(), -1)
            tau = 1.0 if advantage > 0 else 1.05
            terms = []
            for at in np.flatnonzero(chosen(each)):
                position = len(group.prompt_ids) + int(at)
                ratio = (logprobs[position - 1, ids[position]] - float(each.behaviour_logprobs[at])).exp()
                terms.append(-4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage)
            losses.append(torch.stack(terms).mean())
    return torch.stack(losses).mean()


SETTINGS = LearnerSettings.model_validate(
    {
        "objective": {"name": "sapo", "tau_pos": 1.0, "tau_neg": 1.05}, "training": {"steps": 10},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "max_grad_norm": 1e9},
    }
)  # fmt: skip


def gradient_of(loss: Tensor, policy: Policy) -> Tensor:
    policy.model.zero_grad()
    loss.backward()
    return torch.cat([each.grad.flatten() for each in policy.model.parameters()])


async def test_a_step_learns_from_sampled_tokens_alone_in_the_context_of_all(made: Callable[..., Scene]) -> None:
    found = await groups(made())
    everyone = [each for group in found for each in group.trajectories]
    assert sum(not each.loss_mask.all() for each in everyone) > 3  # replies are there
    policy = tiny_policy(ALPHABET, seed=2)  # not the one that has sampled, so ratios differ from 1
    advantages = [group_advantages([each.reward for each in one.trajectories], SETTINGS.advantages) for one in found]
    learner = Learner(policy, SETTINGS, temperature=1.0)
    before = tiny_policy(ALPHABET, seed=2)
    assert learner.step(collate(found, advantages, step=0, microbatch_tokens=10**6)).applied
    gradient = torch.cat([each.grad.flatten() for each in policy.model.parameters()])

    def off(expected: Tensor) -> float:
        return float((gradient - expected).norm() / expected.norm())

    assert off(gradient_of(naive_loss(before, found, lambda each: each.loss_mask), before)) < 1e-4
    assert off(gradient_of(naive_loss(before, found, lambda each: each.token_ids >= 0), before)) > 1e-2
    elsewhere = [told_otherwise(each) for each in found]
    assert off(gradient_of(naive_loss(before, elsewhere, lambda each: each.loss_mask), before)) > 1e-2


def told_otherwise(group: TrajectoryGroup) -> TrajectoryGroup:
    """The same, had the task said something else."""
    other = tiny_policy(ALPHABET, seed=0).tokenizer.encode("?;?", add_special_tokens=False)
    changed = []
    for each in group.trajectories:
        ids = each.token_ids.copy()
        ids[~each.loss_mask] = np.tile(other, int((~each.loss_mask).sum()) // len(other))
        changed.append(replace(each, token_ids=ids))
    return replace(group, trajectories=tuple(changed))
