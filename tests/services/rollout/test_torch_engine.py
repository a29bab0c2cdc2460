"""The torch engine's own promises: exact steps of its decoder, and what its death does to those who wait."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from sapo_learner.errors import ConfigError, Mismatch, Unavailable
from sapo_learner.policy import Policy, tiny_policy
from sapo_learner.snapshot import read_snapshot, write_snapshot
from services.rollout.engines import PolicyVersion, Sampled, SampleRequest
from services.rollout.engines.decoder import FLUSH_TOKENS, BatchDecoder
from services.rollout.engines.torch_engine import TorchEngine

PROMPTS = [[4, 5, 6, 7, 8], [9], [10, 11, 12]]


def policy(seed: int = 0) -> Policy:
    torch.set_num_threads(1)
    made = tiny_policy("0123456789+-=()>", seed=seed)
    with torch.no_grad():
        made.head_weight.mul_(2)
    made.model.generation_config.eos_token_id = None  # responses end at their limit, where the test expects it
    made.tokenizer.eos_token = None
    return made


def requests(*limits: int) -> list[SampleRequest]:
    return [SampleRequest(f"r{i}", PROMPTS[i % 3], 50 + i, limit) for i, limit in enumerate(limits)]


def run(decoder: BatchDecoder, updates: dict[int, PolicyVersion] | None = None) -> dict[str, Sampled]:
    """Step to the end, with new weights before the given steps."""
    responses: dict[str, Sampled] = {}
    step = 0
    while decoder.active:
        deltas = {}
        if updates and step in updates:
            version = updates[step]
            deltas = decoder.update_weights(policy(seed=version.version).tensors(), version)
        for part in (deltas, decoder.step()):
            for name, delta in part.items():
                responses.setdefault(name, Sampled()).add(delta)
        step += 1
    return responses


def assert_recomputed(response: Sampled, request: SampleRequest) -> None:
    begin = 0
    for span in response.spans:
        decoder = BatchDecoder(policy(seed=span.version), PolicyVersion(span.version, 0), slots=1)
        truth = decoder.score(request.prompt_ids, response.token_ids, request.temperature)
        part = slice(begin, begin + span.length)
        assert response.logprobs[part] == pytest.approx(truth[part], abs=1e-5)
        begin += span.length


def test_new_weights_hold_from_exactly_the_next_step_on() -> None:
    decoder = BatchDecoder(policy(), PolicyVersion(0, 0), slots=4)
    wanted = requests(20, 20, 20)
    decoder.add(wanted)
    responses = run(decoder, {5: PolicyVersion(1, 3), 6: PolicyVersion(2, 4), 15: PolicyVersion(3, 9)})
    for request in wanted:
        response = responses[request.id]
        spans = [(span.length, span.version, span.step) for span in response.spans]
        assert spans == [(5, 0, 0), (1, 1, 3), (9, 2, 4), (5, 3, 9)]
        assert_recomputed(response, request)


def test_refused_weights_lose_no_token() -> None:
    decoder = BatchDecoder(policy(), PolicyVersion(0, 0), slots=1)
    (wanted,) = requests(20)
    decoder.add([wanted])
    for _ in range(5):
        assert decoder.step() == {}
    with pytest.raises(Mismatch):
        decoder.update_weights({"stranger": torch.zeros(1)}, PolicyVersion(1, 1))
    response = run(decoder)[wanted.id]
    assert [(span.length, span.version) for span in response.spans] == [(20, 0)]
    assert_recomputed(response, wanted)


def test_rows_that_move_keep_their_positions_cache_seed_and_temperature() -> None:
    decoder = BatchDecoder(policy(), PolicyVersion(0, 0), slots=5)
    wanted = requests(2, 25, 3, 40, 9)
    wanted[3] = SampleRequest("r3", PROMPTS[0], 53, 40, temperature=0.5)
    decoder.add(wanted)
    responses = run(decoder, {10: PolicyVersion(1, 1)})
    for request in wanted:
        assert len(responses[request.id].token_ids) == request.max_tokens
        assert_recomputed(responses[request.id], request)


def test_rows_added_later_join_those_in_flight() -> None:
    decoder = BatchDecoder(policy(), PolicyVersion(0, 0), slots=4)
    wanted = requests(60, 5, 90, 12)  # the third makes the cache grow
    decoder.add(wanted[:2])
    responses: dict[str, Sampled] = {}
    for late in ([], wanted[2:3], wanted[3:]):
        if late:
            decoder.add(late)
        for _ in range(7):
            for name, delta in decoder.step().items():
                responses.setdefault(name, Sampled()).add(delta)
    for name, rest in run(decoder).items():
        known = responses.setdefault(name, Sampled())
        known.token_ids += rest.token_ids
        known.logprobs += rest.logprobs
    for request in wanted:
        decoder = BatchDecoder(policy(), PolicyVersion(0, 0), slots=1)
        truth = decoder.score(request.prompt_ids, responses[request.id].token_ids)
        assert responses[request.id].logprobs == pytest.approx(truth, abs=1e-5)


def test_a_row_reports_at_least_every_flush_tokens() -> None:
    decoder = BatchDecoder(policy(), PolicyVersion(0, 0), slots=1)
    decoder.add(requests(2 * FLUSH_TOKENS + 5))
    sizes = []
    while decoder.active:
        sizes += [len(delta.token_ids) for delta in decoder.step().values()]
    assert sizes == [FLUSH_TOKENS, FLUSH_TOKENS, 5]


def test_a_model_whose_layers_do_not_see_everything_is_refused() -> None:
    windowed = policy()
    windowed.model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ConfigError, match="sliding_attention"):
        BatchDecoder(windowed, PolicyVersion(0, 0), slots=1)


class Unreadable(dict[str, Any]):
    """Tensors with the right names that fail when they are read."""

    def __getitem__(self, name: str) -> Any:
        raise RuntimeError("page fault")


@pytest.mark.timeout(20)
async def test_an_engine_that_dies_says_why_to_everybody() -> None:
    model = policy()
    engine = TorchEngine(model, PolicyVersion(0, 0), slots=1)
    streams = [engine.generate(each) for each in requests(200, 200)]
    await anext(streams[0])
    waiting = asyncio.ensure_future(anext(streams[1]))
    with pytest.raises(RuntimeError, match="page fault"):
        await engine.update_weights(Unreadable(model.tensors()), PolicyVersion(1, 1))
    with pytest.raises(Unavailable, match="page fault"):
        await waiting
    with pytest.raises(Unavailable, match="page fault"):
        async for _ in streams[0]:
            pass
    with pytest.raises(Unavailable, match="page fault"):
        await engine.score([3], [4])
    health = await engine.health()
    assert (health.alive, health.detail) == (False, "RuntimeError: page fault")
    await engine.close()


async def test_nothing_is_remembered_of_responses_that_ended() -> None:
    engine = TorchEngine(policy(), PolicyVersion(0, 0), slots=2)
    streams = [engine.generate(each) for each in requests(3, 40, 200)]
    async for _ in streams[0]:
        pass
    await anext(streams[1])
    await streams[1].aclose()  # type: ignore[attr-defined]
    await anext(streams[2])
    await engine.abort("r2")
    async for _ in streams[2]:
        pass
    await engine.score([3], [4])
    assert (engine._outputs, engine._calls, engine._waiting) == ({}, set(), [])
    with pytest.raises(ValueError, match="in flight"):
        await asyncio.gather(*(anext(engine.generate(each)) for each in requests(9) * 2))
    await engine.close()


# ---- memory: sizes that no address space holds, so that the real allocator refuses


def test_more_slots_than_memory_holds_are_refused_with_what_to_lower() -> None:
    async def make() -> None:
        TorchEngine(policy(), PolicyVersion(0, 0), slots=1 << 55)

    with pytest.raises(Unavailable, match=r"out of memory .*lower engine\.slots \(now 36028797018963968\)"):
        asyncio.run(make())


async def test_an_engine_that_runs_out_of_memory_ends_and_everybody_hears_what_to_lower() -> None:
    unbounded = policy()
    unbounded.model.config.max_position_embeddings = 1 << 60
    engine = TorchEngine(unbounded, PolicyVersion(0, 0), slots=8)
    with pytest.raises(Unavailable, match=r"engine stopped: out of memory while sampling.*lower engine\.slots \(now 8"):
        async for _ in engine.generate(SampleRequest("r", [4], 1, max_tokens=1 << 50)):
            pass
    health = await engine.health()
    assert not health.alive
    assert "lower engine.slots" in health.detail
    await engine.close()


async def test_weights_that_vanish_while_they_are_copied_are_never_served(tmp_path: Path) -> None:
    """Verified, and then not to be read: what is in the model is neither policy, so it is the engine's end."""
    new = policy(seed=1).tensors()
    manifest = write_snapshot(new, step=1, dtype="float32", files={}, directory=tmp_path, part_bytes=1)
    tensors = read_snapshot(manifest, lambda sha256: tmp_path / sha256)
    (tmp_path / manifest.parts[-1].sha256).unlink()
    engine = TorchEngine(policy(), PolicyVersion(0, 0), slots=4)
    with pytest.raises(Unavailable, match="can no longer be read"):
        await engine.update_weights(tensors, PolicyVersion(1, 1))
    assert engine.policy_version == PolicyVersion(0, 0)
    with pytest.raises(Unavailable, match=r"engine stopped: .*can no longer be read"):
        await engine.score([4], [5])


async def test_weights_that_memory_cannot_take_in_end_the_engine_too(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchEngine(policy(), PolicyVersion(0, 0), slots=8)

    def too_much(*_: object) -> None:
        torch.zeros(1 << 55)

    monkeypatch.setattr(engine._decoder, "update_weights", too_much)
    with pytest.raises(Unavailable, match=r"out of memory.*lower engine\.slots"):
        await engine.update_weights({}, PolicyVersion(1, 1))
    async with asyncio.timeout(10):
        while (await engine.health()).alive:
            await asyncio.sleep(0.005)
    await engine.close()
