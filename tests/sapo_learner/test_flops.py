"""FLOPs of a model by the formula, and as counted operator by operator while it runs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, Qwen3Config, Qwen3MoeConfig

from sapo_learner import flops
from sapo_learner.flops import ModelFlops, peak_flops
from sapo_learner.learner import Learner
from sapo_learner.policy import Policy
from tests.recorded import random_group
from tests.sapo_learner.recorded_steps import batch_of, settings_of

ROWS, LENGTH, VOCABULARY = 3, 48, 40
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 72, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def policy_of(config: Any) -> Policy:
    torch.manual_seed(0)
    config._experts_implementation = "eager"
    return Policy(AutoModelForCausalLM.from_config(config, attn_implementation="eager").train(), None, {})


def formula(policy: Policy, targets: int = ROWS * LENGTH) -> float:
    """Of ROWS sequences of LENGTH tokens."""
    (one,) = batch_of(settings_of(), [random_group(0)]).microbatches
    ids = torch.zeros(ROWS * LENGTH, dtype=torch.int64)
    found = ModelFlops.of(policy)
    assert found is not None
    return found.of_step([replace(one, input_ids=ids, lengths=(LENGTH,) * ROWS, targets=ids[:targets])])


def counted(policy: Policy) -> int:
    """By torch, of a forward and backward pass through the model as transformers wrote it; all products in `mm`s."""
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        policy.model(input_ids=ids, use_cache=False).logits.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SHAPE, tie_word_embeddings=True),
        Qwen3Config(**SHAPE, tie_word_embeddings=False),
        GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=None),
    ],
    ids=["tied head", "untied head", "gpt2"],
)
def test_of_a_dense_model_they_are_those_that_torch_counts(config: Any) -> None:
    policy = policy_of(config)
    assert formula(policy) == pytest.approx(counted(policy), rel=0.02)


@pytest.mark.parametrize(
    "config",
    [
        Qwen3MoeConfig(**SHAPE, **EXPERTS),
        MixtralConfig(**SHAPE, num_local_experts=8, num_experts_per_tok=2),
    ],
    ids=["qwen3-moe", "mixtral"],
)
def test_of_experts_only_the_active_ones_count(config: Any) -> None:
    policy = policy_of(config)
    assert formula(policy) == pytest.approx(counted(policy), rel=0.02)


def test_the_output_projection_runs_on_response_tokens_alone() -> None:
    policy = policy_of(Qwen3Config(**SHAPE))
    saved = formula(policy) - formula(policy, targets=100)
    assert saved == 6 * policy.head_weight.numel() * (ROWS * LENGTH - 100)


def test_weights_that_are_not_trained_have_no_gradient_to_be_computed() -> None:
    policy = policy_of(Qwen3Config(**SHAPE))
    before = formula(policy)
    layer = policy.model.base_model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    assert before - formula(policy) == 2 * layer.numel() * ROWS * LENGTH


def test_a_sliding_window_bounds_what_a_token_attends_to() -> None:
    windowed = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    full, some = (policy_of(Qwen3Config(**SHAPE, **more)) for more in ({}, windowed))
    assert formula(full) - formula(some) == 2 * 12 * 4 * 16 * ROWS * LENGTH * (LENGTH - 8)


def test_of_a_model_that_does_not_say_how_many_experts_are_active_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = policy_of(Qwen3MoeConfig(**SHAPE, **EXPERTS))
    monkeypatch.setattr(flops, "_CHOSEN", ("under_a_name_not_known_here",))
    assert ModelFlops.of(policy) is None


def test_on_a_known_gpu_the_share_of_its_peak_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    gpu = torch.device("cuda", 0)
    assert peak_flops(gpu, torch.bfloat16) == 989e12
    assert peak_flops(gpu, torch.float64) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda _: "a GPU of next year")
    assert peak_flops(gpu, torch.bfloat16) is None


def test_mfu_is_model_flops_over_time_over_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sapo_learner.learner.peak_flops", lambda *_: 1e12)
    policy = policy_of(Qwen3Config(**{**SHAPE, "vocab_size": 64}))
    settings = settings_of()
    batch = batch_of(settings)
    update = Learner(policy, settings, temperature=1.0).step(batch)
    expected = ModelFlops.of(policy)
    assert expected is not None
    assert update.flops_per_second == pytest.approx(expected.of_step(batch.microbatches) / update.slowest_rank_seconds)
    assert update.mfu == pytest.approx(update.flops_per_second / 1e12)
