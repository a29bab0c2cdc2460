"""What every inference engine owes the worker: true log-probs, one policy per token, equal seeds equal tokens.

An engine is added by one line in ENGINES. The ground truth is the model itself, run over the whole sequence.
vLLM's part runs where vLLM is installed (make test-vllm); its engines are kept from test to test, because each takes
twenty seconds to start.
"""

import asyncio
import copy
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from itertools import pairwise

import pytest
import pytest_asyncio
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from sapo_learner.errors import ConfigError, InvalidTrajectory, Mismatch, Unavailable
from sapo_learner.policy import Policy, tiny_policy
from services.rollout.engines import Engine, PolicyVersion, Sampled, SampleRequest
from services.rollout.engines.torch_engine import TorchEngine
from tests.contract.vllm_engines import needs_vllm, vllm_engine

pytestmark = pytest.mark.asyncio(loop_scope="session")  # vLLM's engines live in one loop
Start = Callable[..., Awaitable[Engine]]
Make = Callable[..., Policy]
ALPHABET = "0123456789+-=()>"
PROMPTS = [[4], [5, 13, 7], [3, 4, 5, 6, 7, 8, 9, 10], [12, 13]]
TOLERANCE = 1e-5  # of a float32 log-prob, against the plain forward pass


async def torch_engine(policy: Policy, slots: int) -> Engine:
    return TorchEngine(copy.deepcopy(policy), PolicyVersion(0, 0), slots=slots)


ENGINES: dict[str, Callable[[Policy, int], Awaitable[Engine]]] = {"torch": torch_engine, "vllm": vllm_engine}
PARAMETERS = ["torch", pytest.param("vllm", marks=[pytest.mark.vllm, needs_vllm])]


@pytest_asyncio.fixture(params=PARAMETERS, loop_scope="session")
async def start(request: pytest.FixtureRequest) -> AsyncIterator[Start]:
    """Starts engines that serve a policy as version 0."""
    torch.set_num_threads(1)
    engines: list[Engine] = []

    async def started(policy: Policy, slots: int = 8) -> Engine:
        engines.append(await ENGINES[request.param](policy, slots))
        return engines[-1]

    yield started
    for engine in engines:
        if request.param != "vllm":  # those are kept
            await engine.close()


def qwen3(seed: int = 0) -> Policy:
    """Tied embeddings, made larger: a distribution that depends on the context."""
    policy = tiny_policy(ALPHABET, seed=seed)
    with torch.no_grad():
        policy.head_weight.mul_(2)
    return policy


def llama(seed: int = 0) -> Policy:
    """Another architecture: an output projection of its own, two heads of keys and values, three layers."""
    tokenizer = tiny_policy(ALPHABET, seed=0).tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=96, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.15,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    return Policy(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), tokenizer, {})


def endless(policy: Policy) -> Policy:
    """The same policy when no token ends a response."""
    changed = copy.deepcopy(policy)
    changed.model.generation_config.eos_token_id = None
    changed.tokenizer.eos_token = None
    return changed


def mixture(seed: int = 0) -> Policy:
    """A mixture of experts, two of eight at a time."""
    tokenizer = tiny_policy(ALPHABET, seed=0).tokenizer
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, intermediate_size=96, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.15,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(seed)
    return Policy(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), tokenizer, {})


every_architecture = pytest.mark.parametrize("make", [qwen3, llama, mixture])


def request(
    name: str = "a", seed: int = 7, prompt: int = 1, tokens: int = 12, temperature: float = 1.0
) -> SampleRequest:
    return SampleRequest(name, PROMPTS[prompt % len(PROMPTS)], seed, tokens, temperature)


Seen = asyncio.Queue[int]  # the version of every delta that arrived


async def respond(engine: Engine, wanted: SampleRequest, seen: Seen | None = None) -> Sampled:
    """The response as far as the iterator gave it."""
    sampled = Sampled()
    async with aclosing(engine.generate(wanted)) as deltas:  # type: ignore[type-var]
        async for delta in deltas:
            sampled.add(delta)
            if seen is not None:
                seen.put_nowait(delta.policy.version)
    return sampled


async def respond_all(engine: Engine, wanted: list[SampleRequest]) -> list[Sampled]:
    return list(await asyncio.gather(*(respond(engine, each) for each in wanted)))


@torch.no_grad()
def recomputed(policy: Policy, prompt: list[int], tokens: list[int], temperature: float) -> Tensor:
    """[T]: log-probs by one plain pass of the full model over prompt and response."""
    logits = policy.model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def assert_true(sampled: Sampled, wanted: SampleRequest, policies: Mapping[int, Policy]) -> None:
    """Every token's log-prob is the one under the version that its span names."""
    assert sum(span.length for span in sampled.spans) == len(sampled.token_ids) == len(sampled.logprobs)
    begin = 0
    for span in sampled.spans:
        part = slice(begin, begin + span.length)
        truth = recomputed(policies[span.version], list(wanted.prompt_ids), sampled.token_ids, wanted.temperature)[part]
        torch.testing.assert_close(torch.tensor(sampled.logprobs[part]), truth, atol=TOLERANCE, rtol=0)
        begin += span.length


# ---- log-probs and versions


@every_architecture
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
async def test_logprobs_are_those_of_a_plain_forward_pass(start: Start, make: Make, temperature: float) -> None:
    policy = make()
    engine = await start(policy, slots=5)
    wanted = [request(f"r{i}", seed=i, prompt=i, tokens=5 + 3 * i, temperature=temperature) for i in range(14)]
    for each, sampled in zip(wanted, await respond_all(engine, wanted), strict=True):
        assert_true(sampled, each, {0: policy})


@every_architecture
async def test_after_updates_in_mid_response_every_logprob_belongs_to_the_version_its_span_names(
    start: Start, make: Make
) -> None:
    policies = {version: endless(make(seed=version)) for version in range(4)}
    engine = await start(policies[0], slots=4)
    # Rows of different lengths, and more than fit: they end, move and begin while the weights change.
    wanted = [request(f"r{i}", seed=i, prompt=i, tokens=150 + 20 * (i % 4), temperature=1.3) for i in range(7)]
    seen = Seen()
    tasks = [asyncio.create_task(respond(engine, each, seen)) for each in wanted]
    for version in (1, 2, 3):
        while await seen.get() != version - 1:
            pass
        await engine.update_weights(policies[version].tensors(), PolicyVersion(version, 10 * version))
        assert engine.policy_version == PolicyVersion(version, 10 * version)
    responses = await asyncio.gather(*tasks)
    for each, sampled in zip(wanted, responses, strict=True):
        assert_true(sampled, each, policies)
        assert all(one.version < other.version for one, other in pairwise(sampled.spans))
        assert all(span.step == 10 * span.version for span in sampled.spans)
    assert {span.version for each in responses for span in each.spans} == {0, 1, 2, 3}
    assert max(len(each.spans) for each in responses) == 4


async def test_after_an_update_sampling_goes_on_as_from_a_fresh_prefill_under_the_new_weights(start: Start) -> None:
    old, new = endless(qwen3(seed=1)), endless(qwen3(seed=2))
    engine, seen = await start(old), Seen()
    wanted = request(tokens=150, temperature=0)
    task = asyncio.create_task(respond(engine, wanted, seen))
    await seen.get()
    await engine.update_weights(new.tensors(), PolicyVersion(1, 1))
    sampled = await task
    before, after = (span.length for span in sampled.spans)
    fresh = SampleRequest("fresh", [*wanted.prompt_ids, *sampled.token_ids[:before]], 0, after, 0)
    assert (await respond(await start(new), fresh)).token_ids == sampled.token_ids[before:]


async def test_score_is_what_sampling_records(start: Start) -> None:
    policy = qwen3()
    engine = await start(policy)
    busy = asyncio.create_task(respond(engine, request("busy", tokens=60)))
    for temperature in (0.6, 1.0):
        sampled = await respond(engine, request("one", temperature=temperature))
        scored = await engine.score(PROMPTS[1], sampled.token_ids)
        truth = recomputed(policy, PROMPTS[1], sampled.token_ids, 1.0)  # the model's own, whatever was sampled at
        assert scored == pytest.approx(truth.tolist(), abs=TOLERANCE)
        if temperature == 1.0:
            assert scored == pytest.approx(sampled.logprobs, abs=TOLERANCE)
    assert_true(await busy, request("busy", tokens=60), {0: policy})


async def test_weights_of_another_model_are_refused_and_the_old_policy_goes_on_unharmed(start: Start) -> None:
    policy = endless(qwen3())
    undisturbed = await respond(await start(policy), request(tokens=100))
    engine, seen = await start(policy), Seen()
    task = asyncio.create_task(respond(engine, request(tokens=100), seen))
    await seen.get()
    for _ in range(10):  # whatever the response has got to
        with pytest.raises(Mismatch, match="names"):
            await engine.update_weights({"stranger": torch.zeros(1)}, PolicyVersion(1, 1))
    assert engine.policy_version == PolicyVersion(0, 0)
    sampled = await task
    assert sampled.token_ids == undisturbed.token_ids
    assert_true(sampled, request(tokens=100), {0: policy})
    assert (await engine.health()).alive


# ---- randomness


async def test_a_response_depends_on_its_seed_and_not_on_who_shares_the_batch(start: Start) -> None:
    policy = qwen3()
    wanted = [request(f"r{i}", seed=100 + i, prompt=i, tokens=20 + i) for i in range(10)]
    alone = [await respond(await start(policy, slots=1), each) for each in wanted]
    engine = await start(policy, slots=4)
    crowd = [request(f"n{i}", seed=i, prompt=i, tokens=4 + i % 9) for i in range(20)]
    together = (await respond_all(engine, crowd[:10] + wanted + crowd[10:]))[10:20]
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    for one, other in zip(alone, together, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)
    assert len({tuple(each.token_ids) for each in alone}) > len(alone) / 2  # very short ones may be equal


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
async def test_tokens_are_drawn_as_often_as_their_probability_says(start: Start, temperature: float) -> None:
    policy, count = qwen3(), 3000
    engine = await start(policy, slots=256)
    wanted = [request(f"r{seed}", seed=seed, tokens=1, temperature=temperature) for seed in range(count)]
    drawn = torch.tensor([each.token_ids[0] for each in await respond_all(engine, wanted)])
    observed = torch.bincount(drawn, minlength=policy.vocabulary).double()
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1]
    expected = torch.softmax(logits.double() / temperature, dim=-1) * count
    rare = expected < 5  # one cell together, as the test's approximation wants
    pairs = [*zip(observed[~rare], expected[~rare], strict=True), (observed[rare].sum(), expected[rare].sum())]
    statistic = sum(float((seen - due) ** 2 / due) for seen, due in pairs if due > 0)
    freedom = len(pairs) - 1
    assert freedom > 3
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


async def test_at_temperature_zero_the_most_likely_token_is_taken(start: Start) -> None:
    policy = endless(qwen3())
    sampled = await respond(await start(policy), request(tokens=30, temperature=0))
    ids = list(PROMPTS[1])
    for token in sampled.token_ids:
        with torch.no_grad():
            assert int(policy.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)


# ---- beginning and ending


async def test_a_response_ends_with_its_end_token_or_at_its_limit(start: Start) -> None:
    policy = qwen3()
    engine = await start(policy)
    wanted = [request(f"r{i}", seed=i, prompt=i, tokens=8) for i in range(40)]
    reasons = set()
    for sampled in await respond_all(engine, wanted):
        reasons.add(sampled.finish_reason)
        *body, last = sampled.token_ids
        assert not policy.end_ids & set(body)
        assert (sampled.finish_reason == "stop") == (last in policy.end_ids)
        assert len(sampled.token_ids) == 8 or sampled.finish_reason == "stop"
    assert reasons == {"stop", "length"}


async def test_more_requests_than_places_are_all_answered_and_counted(start: Start) -> None:
    engine = await start(qwen3(), slots=3)
    responses = await respond_all(engine, [request(f"r{i}", seed=i, prompt=i, tokens=1 + i % 17) for i in range(60)])
    assert all(each.finish_reason for each in responses)
    health = await engine.health()
    assert (health.alive, health.rows) == (True, 0)
    assert health.tokens == sum(len(each.token_ids) for each in responses)
    intervals = engine.busy_intervals()
    assert intervals
    assert all(begin <= end for begin, end in intervals)
    assert engine.busy_intervals() == []


async def test_a_long_response_is_reported_while_it_is_sampled(start: Start) -> None:
    engine = await start(endless(qwen3()))
    deltas = [delta async for delta in engine.generate(request(tokens=200))]
    assert sum(len(each.token_ids) for each in deltas) == 200
    assert len(deltas) > 3
    assert [each.finish_reason for each in deltas] == [None] * (len(deltas) - 1) + ["length"]


@pytest.mark.parametrize("how", ["abort", "close", "cancel"])
async def test_an_abandoned_response_ends_frees_its_place_and_leaves_its_neighbours_alone(
    start: Start, how: str
) -> None:
    policy = endless(qwen3())
    neighbours = [request("b", seed=2, prompt=2, tokens=180), request("c", seed=3, prompt=3, tokens=100)]
    alone = await respond_all(await start(policy, slots=2), neighbours)
    engine, seen = await start(policy, slots=2), Seen()
    doomed = asyncio.create_task(_abandon(engine, request("a", tokens=240), seen, how))
    others = [asyncio.create_task(respond(engine, each)) for each in neighbours]
    await seen.get()
    if how == "abort":
        await engine.abort("a")
    if how == "cancel":
        doomed.cancel()
    (sampled,) = await asyncio.gather(doomed, return_exceptions=True)
    assert isinstance(sampled, asyncio.CancelledError) if how == "cancel" else sampled.finish_reason is None
    assert [each.token_ids for each in await asyncio.gather(*others)] == [each.token_ids for each in alone]
    health = await engine.health()
    assert health.rows == 0
    assert health.tokens < 240 + 180 + 100
    assert len((await respond(engine, request("a", tokens=5))).token_ids) == 5  # its name is free again


async def _abandon(engine: Engine, wanted: SampleRequest, seen: Seen, how: str) -> Sampled:
    if how != "close":
        return await respond(engine, wanted, seen)
    sampled = Sampled()
    async with aclosing(engine.generate(wanted)) as deltas:  # type: ignore[type-var]
        async for delta in deltas:
            sampled.add(delta)
            seen.put_nowait(0)
            return sampled
    raise AssertionError("no tokens")


async def test_aborting_what_waits_or_does_not_exist_is_harmless(start: Start) -> None:
    engine, seen = await start(endless(qwen3()), slots=1), Seen()
    busy = asyncio.create_task(respond(engine, request("busy", tokens=200), seen))
    waiting = asyncio.create_task(respond(engine, request("waiting")))
    await seen.get()
    await engine.abort("nobody")
    await engine.abort("waiting")
    assert (await waiting).token_ids == []
    assert (await busy).finish_reason == "length"


async def test_a_request_that_cannot_be_answered_is_refused_and_harms_nobody(start: Start) -> None:
    engine = await start(qwen3())
    busy = asyncio.create_task(respond(engine, request("busy", tokens=40)))
    with pytest.raises(ConfigError, match="context"):
        await respond(engine, request("long", tokens=1000))
    for wrong in ({"prompt_ids": []}, {"max_tokens": 0}, {"temperature": -1.0}, {"seed": -1}):
        with pytest.raises(InvalidTrajectory):
            SampleRequest(**({"id": "x", "prompt_ids": [3], "seed": 0, "max_tokens": 1} | wrong))  # type: ignore[arg-type]
    assert (await busy).finish_reason


@pytest.mark.timeout(20)
async def test_closing_a_busy_engine_ends_everything_that_waits_for_it(start: Start) -> None:
    engine, seen = await start(endless(qwen3()), slots=2), Seen()
    tasks = [asyncio.create_task(respond(engine, request(f"r{i}", tokens=250), seen)) for i in range(5)]
    await seen.get()
    await engine.close()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, Unavailable)
    assert not (await engine.health()).alive
    with pytest.raises(Unavailable):
        await respond(engine, request())
    with pytest.raises(Unavailable):
        await engine.score([3], [4])
