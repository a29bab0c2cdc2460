"""What every rank of a torchrun does with whole models (see test_several_ranks.py): steps, checkpoints, snapshots.

Everything is compared with a learner that is alone, in the same process. "From one" checkpoints are made by such a one;
"from several" are left for the test to resume, which is alone, too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from sapo_learner import checkpoint
from sapo_learner.batching import TrainingBatch
from sapo_learner.config import LearnerSettings, ParallelSettings
from sapo_learner.empty_policy import empty_like
from sapo_learner.errors import SapoError
from sapo_learner.hidden_states import use_packing
from sapo_learner.learner import Learner
from sapo_learner.parallel import ALONE, Ranks
from sapo_learner.policy import Policy
from sapo_learner.resume import capture, restore_from
from sapo_learner.sharding import ShardedPolicy, checkpoint_activations, gathered, sharded, whole
from sapo_learner.train import Position
from tests.recorded import VOCABULARY, random_group
from tests.sapo_learner.recorded_steps import batch_of, settings_of

CPU = torch.device("cpu")
MODELS = ("dense", "moe")
DTYPES = {"float64": torch.float64, "float32": torch.float32}
STEPS, HALF, BUDGET = 10, 5, 40
_ADAMW = {"learning_rate": 2e-4, "warmup_steps": 0, "weight_decay": 0.1, "max_grad_norm": 1e9}


def settings() -> LearnerSettings:
    return settings_of(optimizer=_ADAMW)


def model_policy(kind: str, dtype: torch.dtype, seed: int = 0) -> Policy:
    """A Qwen3 with a tied head, or a mixture of experts with an untied one."""
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 40, "initializer_range": 0.2,
        "tie_word_embeddings": kind == "dense", "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3Config(**shape) if kind == "dense" else Qwen3MoeConfig(**shape, **experts)
    if kind == "moe":
        config._experts_implementation = "eager"  # the only one that takes float64
    torch.manual_seed(seed)
    policy = Policy(AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), None, {})
    use_packing(policy)
    return policy


def batches() -> Iterator[TrainingBatch]:
    for step in range(STEPS):
        groups = [random_group(4 * step + draw, policy_step=1, spread=1.0) for draw in range(4)]
        yield batch_of(settings(), groups, BUDGET)


def learner_of(kind: str, dtype: torch.dtype, ranks: Ranks, parallel: ParallelSettings, seed: int = 0) -> Learner:
    policy = model_policy(kind, dtype, seed)
    if parallel.activation_checkpointing:
        checkpoint_activations(policy)
    if ranks.size > 1:
        # Nobody but rank 0 has weights to begin with.
        shape = empty_like(policy)
        if parallel.activation_checkpointing:
            checkpoint_activations(shape)
        policy = sharded(shape, ranks, parallel, CPU, policy.tensors() if ranks.first else None)
    return Learner(policy, settings(), temperature=1.0, ranks=ranks)


def gradient(learner: Learner, batch: TrainingBatch) -> Tensor:
    assert learner.step(batch).applied
    return torch.cat([whole(each.grad).flatten() for each in learner.policy.model.parameters()])


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in gathered(learner.policy.tensors()).items()}


def advance(learner: Learner, first: int, last: int) -> dict[str, Tensor]:
    for number, batch in enumerate(batches()):
        if first <= number < last:
            assert learner.step(batch).applied
    return weights(learner)


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest of any entry."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def results(ranks: Ranks, directory: Path, shard: int | None) -> dict[str, Any]:
    parallel = ParallelSettings(shard=shard)
    found: dict[str, Any] = {}
    for kind in MODELS:
        for name, dtype in DTYPES.items():
            found[f"{kind} {name}"] = _steps(kind, dtype, ranks, parallel, directory / f"{kind}-{name}")
    found["activation checkpointing"] = _recomputed(ranks, parallel)
    found["bfloat16"] = _sixteen_bit(ranks, shard)
    found["router load"] = _router_load(ranks, parallel)
    found["snapshot"] = _snapshot(ranks, parallel)
    found["another model"] = _refused(ranks, parallel, directory / "dense-float64")
    return found


def _steps(
    kind: str, dtype: torch.dtype, ranks: Ranks, parallel: ParallelSettings, directory: Path
) -> dict[str, float]:
    first = next(batches())
    expected = gradient(learner_of(kind, dtype, ALONE, parallel), first)
    found = gradient(learner_of(kind, dtype, ranks, parallel), first)
    alone, ours = learner_of(kind, dtype, ALONE, parallel), learner_of(kind, dtype, ranks, parallel)
    advance(alone, 0, HALF)
    if ranks.first:
        checkpoint.save(directory / "from-one", capture(alone, Position()), token=1)
    advance(ours, 0, HALF)
    checkpoint.save(directory / "from-several", capture(ours, Position()), token=1, ranks=ranks)
    truth, came_to = advance(alone, HALF, STEPS), advance(ours, HALF, STEPS)
    resumed = {
        source: _resumed(kind, dtype, ranks, parallel, directory / source) for source in ("from-one", "from-several")
    }
    return {
        "gradient": float((found - expected).abs().max() / expected.abs().max()),
        "weights": difference(came_to, truth),
        "resumed from one": difference(resumed["from-one"], truth),
        "resumed from several": difference(resumed["from-several"], came_to),
        "moved": difference(truth, weights(learner_of(kind, dtype, ALONE, parallel))),
    }


def _resumed(
    kind: str, dtype: torch.dtype, ranks: Ranks, parallel: ParallelSettings, directory: Path
) -> dict[str, Tensor]:
    """Weights at the end, of ranks that begin with other weights and go on from the checkpoint there."""
    learner = learner_of(kind, dtype, ranks, parallel, seed=7)
    loaded = ranks.decided(lambda: checkpoint.load_newest(directory, read=checkpoint.load_facts))
    restore_from(learner, loaded.state, loaded.found.path)
    assert learner.step_count == HALF
    return advance(learner, HALF, STEPS)


def _recomputed(ranks: Ranks, parallel: ParallelSettings) -> float:
    first, asked = next(batches()), parallel.model_copy(update={"activation_checkpointing": True})
    expected = gradient(learner_of("dense", torch.float64, ALONE, parallel), first)
    found = gradient(learner_of("dense", torch.float64, ranks, asked), first)
    return float((found - expected).abs().max() / expected.abs().max())


def _router_load(ranks: Ranks, parallel: ParallelSettings) -> dict[str, Any]:
    """What one rank reports of it and what several do, of a step in which one of those has nothing to do."""
    one, few = next(batches()), batch_of(settings(), [random_group(0, policy_step=1, spread=1.0)], 10**6)
    found: dict[str, Any] = {}
    for name, batch, again in (("all work", one, False), ("recomputed", one, True), ("one is idle", few, False)):
        asked = parallel.model_copy(update={"activation_checkpointing": again})
        alone, shared = (
            learner_of("moe", torch.float64, each, asked).step(batch).diagnostics for each in (ALONE, ranks)
        )
        found[name] = [{key: each[key] for key in sorted(each) if "router" in key} for each in (alone, shared)]
    return found


def _sixteen_bit(ranks: Ranks, shard: int | None) -> dict[str, Any]:
    first = next(batches())
    learner = learner_of("dense", torch.float32, ranks, ParallelSettings(precision="bfloat16", shard=shard))
    expected = gradient(learner_of("dense", torch.float32, ALONE, ParallelSettings()), first)
    found = gradient(learner, first)
    return {
        "cosine": float(torch.nn.functional.cosine_similarity(found, expected, dim=0)),
        "equal": torch.equal(found, expected),
        "dtypes": sorted({str(each.dtype) for each in learner.policy.model.parameters()}),
        "moments": sorted({str(each.dtype) for each in learner.optimizer_tensors().values()}),
    }


def _snapshot(ranks: Ranks, parallel: ParallelSettings) -> dict[str, bool]:
    policy = learner_of("dense", torch.float32, ranks, parallel).policy
    assert isinstance(policy, ShardedPolicy)
    plain = model_policy("dense", torch.float32)
    expected = {name: each.to(torch.bfloat16) for name, each in plain.tensors().items()}
    copied = policy.copied("bfloat16")
    before = weights(Learner(policy, settings(), temperature=1.0, ranks=ranks))
    with policy.rounded("bfloat16"):
        inside = gathered(policy.tensors())
    after = gathered(policy.tensors())
    return {
        "only on rank 0": bool(copied) == ranks.first,
        "rounded": all(torch.equal(copied[name], expected[name]) for name in copied),
        "inside": all(torch.equal(inside[name], expected[name].float()) for name in inside),
        "restored": all(torch.equal(after[name], before[name]) for name in after),
    }


def _refused(ranks: Ranks, parallel: ParallelSettings, directory: Path) -> dict[str, str]:
    """What is said where checkpoints of the other kind of model are resumed."""
    said = {}
    for source in ("from-one", "from-several"):
        learner = learner_of("moe", torch.float64, ranks, parallel)
        loaded = ranks.decided(lambda: checkpoint.load_newest(directory / source, read=checkpoint.load_facts))  # noqa: B023
        try:
            restore_from(learner, loaded.state, loaded.found.path)
        except SapoError as error:
            said[source] = str(error)
    return said
