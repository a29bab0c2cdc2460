"""What benchmarks.gpu measures, each row in a process of its own: model shapes, synthetic groups, two measurements."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.logprobs import naive, ours
from sapo_learner.advantages import step_advantages
from sapo_learner.batching import collate
from sapo_learner.config import LearnerSettings, ParallelSettings, TrainingSettings
from sapo_learner.empty_policy import empty_policy
from sapo_learner.errors import Unavailable
from sapo_learner.flops import ModelFlops, peak_flops
from sapo_learner.learner import Learner
from sapo_learner.memory import enough_memory
from sapo_learner.parallel import Ranks, joined
from sapo_learner.policy import Policy
from sapo_learner.sharding import checkpoint_activations, compute_dtype, sharded
from sapo_learner.snapshot import LazyTensors
from sapo_learner.trajectory import SamplingParameters, Trajectory, TrajectoryGroup, VersionSpan

WARM_UP, MEASURED = 2, 5
GROUP_SIZE = 8
DETERMINISTIC, TF32, NO_TF32 = "deterministic", "TF32", "no TF32"


@dataclass(frozen=True)
class Shape:
    """config: what would stand in the model's config.json. checkpointing: whether layers are computed again."""

    config: Mapping[str, Any]
    checkpointing: bool = False

    def empty(self) -> Policy:
        """Without weights; takes no memory."""
        return empty_policy({"config.json": json.dumps(dict(self.config)).encode()}, packs=True)


def _qwen3(hidden: int, layers: int, heads: int, intermediate: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": intermediate,
        "max_position_embeddings": 40_960, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, **others,
    }  # fmt: skip


def _experts(count: int, active: int, intermediate: int) -> dict[str, Any]:
    sizes = {"num_experts": count, "num_experts_per_tok": active, "moe_intermediate_size": intermediate}
    return {"model_type": "qwen3_moe", "norm_topk_prob": True, "tie_word_embeddings": False, **sizes}


_TINY = {"vocab_size": 2_048, "num_key_value_heads": 2, "head_dim": 16}

#: The first three are the published Qwen3-0.6B, 1.7B and 4B; the mixture of experts is made up, and small.
SHAPES = {
    "0.6B": Shape(_qwen3(1_024, 28, 16, 3_072)),
    "1.7B": Shape(_qwen3(2_048, 28, 16, 6_144)),
    "4B": Shape(_qwen3(2_560, 36, 32, 9_728), checkpointing=True),
    "MoE": Shape(_qwen3(1_024, 12, 16, 3_072, **_experts(32, 4, 768))),
}
MINIATURES = {
    "miniature": Shape(_qwen3(64, 2, 4, 128, **_TINY)),
    "miniature MoE": Shape(_qwen3(64, 2, 4, 128, **_TINY, **_experts(8, 2, 32)), checkpointing=True),
}


@dataclass(frozen=True)
class Case:
    """One row. way: whose log-probs; or how a step differs from others, "" for not at all."""

    table: str  # "steps" or "logprobs"
    shape: str
    tokens: int
    way: str = ""

    def __str__(self) -> str:
        return f"{self.table}, {self.shape}, {self.tokens} tokens{self.way and f', {self.way}'}"


def cases(*, small: bool) -> list[Case]:
    """All rows in the order in which they are measured: what is quick and says most comes first."""
    shapes, sizes = (MINIATURES, (256,)) if small else (SHAPES, (2_048, 8_192, 32_768))
    middle = sizes[len(sizes) // 2]
    first = next(iter(shapes))
    logprobs = [Case("logprobs", first, size, way) for size in sizes for way in WAYS]
    steps = [Case("steps", name, size) for size in sizes for name in shapes]
    rows = [*logprobs, *steps, *(Case("steps", first, middle, way) for way in (DETERMINISTIC, NO_TF32))]
    return [each for each in rows if not (small and TF32 in each.way)]  # which means nothing on a CPU


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """The figures of one row, from this process; or a "problem", which is a finding, too."""
    torch.manual_seed(0)
    learner = case.table == "steps" and case.way != NO_TF32
    torch.set_float32_matmul_precision("high" if learner or case.way == f"ours, {TF32}" else "highest")
    torch.utils.deterministic.fill_uninitialized_memory = False  # as the learner does
    torch.use_deterministic_algorithms(case.way == DETERMINISTIC, warn_only=True)
    found: dict[str, Any] = {"card": torch.cuda.get_device_name(device) if device.type == "cuda" else ""}
    try:
        with enough_memory("measuring", where=str(case), fix="take a card with more"):
            return found | (_steps if case.table == "steps" else _logprobs)(case, device)
    except Unavailable:
        return found | {"problem": "out of memory"}
    except ModuleNotFoundError as error:  # TRL is no part of an installation without the extra `dev`
        return found | {"problem": f"{error.name} is not installed"}


def _steps(case: Case, device: torch.device) -> dict[str, Any]:
    shape = (SHAPES | MINIATURES)[case.shape]
    settings = LearnerSettings(training=TrainingSettings(microbatch_tokens=case.tokens))
    groups = synthetic_groups(case.tokens, int(shape.config["vocab_size"]))
    advantages = step_advantages(groups, settings.advantages)
    batch = collate(groups, advantages, step=1, microbatch_tokens=case.tokens)
    lengths = [length for each in batch.microbatches for length in each.lengths]
    trained = []
    with joined(device) as ranks:
        policy = random_policy(shape, ranks, device)
        flops, peak = ModelFlops.of(policy), peak_flops(device, compute_dtype(policy))
        learner = Learner(policy, settings, temperature=1.0, ranks=ranks)

        def step() -> None:
            report = learner.step(batch)
            if not report.applied:
                raise SystemExit(f"an update was refused: {report.refusal}")
            trained.append(report.tokens)

        seconds, memory = _timed(step, device)
    assert flops is not None, "each of SHAPES says how many heads and active experts it has"
    return {
        "seconds": seconds, "flops": flops.of_step(batch.microbatches), "peak": peak, "memory": memory,
        "trained": trained[-1], "responses": len(lengths), "longest": max(lengths),
    }  # fmt: skip


def random_policy(shape: Shape, ranks: Ranks, device: torch.device) -> Policy:
    """Sharded over the ranks as the learner's is: float32 weights made on the device, passes in bfloat16."""
    parallel = ParallelSettings(precision="bfloat16", activation_checkpointing=shape.checkpointing)
    empty = shape.empty()
    if shape.checkpointing:
        checkpoint_activations(empty)
    weights = LazyTensors(empty.tensors(), partial(_random, device))
    return sharded(empty, ranks, parallel, device, weights)


def _random(device: torch.device, _: str, like: Tensor) -> Tensor:
    if like.dim() == 1:  # norms
        return torch.ones(like.shape, device=device)
    return torch.randn(like.shape, device=device) * 0.02


def synthetic_groups(tokens: int, vocabulary: int) -> list[TrajectoryGroup]:
    """Groups with signal whose responses, each with its prompt, are `tokens` in all. Lengths are log-normal, with a
    median of `tokens` / 32 but at most 512, and none above `tokens` / 2 but perhaps the last."""
    random = np.random.default_rng(0)
    median = min(512, tokens // 32)
    prompt_ids = random.integers(0, vocabulary, median // 4).astype(np.int32)
    shortest = len(prompt_ids) + 1
    lengths, left = [], tokens
    while left:
        drawn = int(np.clip(random.lognormal(np.log(median), 1.0), 1, tokens // 2))
        row = min(len(prompt_ids) + drawn, left)
        row = left if left - row < shortest else row  # no room for another one
        lengths.append(row - len(prompt_ids))
        left -= row
    parts = np.array_split(np.array(lengths), max(1, len(lengths) // GROUP_SIZE))
    return [_group(draw, prompt_ids.copy(), part.tolist(), vocabulary) for draw, part in enumerate(parts)]


def _group(draw: int, prompt_ids: Any, lengths: list[int], vocabulary: int) -> TrajectoryGroup:
    random = np.random.default_rng(draw)
    responses = [
        Trajectory(
            token_ids=random.integers(0, vocabulary, length).astype(np.int32),
            behaviour_logprobs=(-np.log(vocabulary) + 0.1 * random.standard_normal(length)).astype(np.float32),
            loss_mask=np.ones(length, np.bool_),
            spans=(VersionSpan(length, 0, 0),),
            rewards={"correct": float(index % 2)},
            finish_reason="stop",
        )
        for index, length in enumerate(lengths)
    ]
    return TrajectoryGroup(
        draw=draw, attempt=1, task="synthetic", prompt_id=str(draw), epoch=0, seed=draw, prompt_ids=prompt_ids,
        trajectories=tuple(responses), sampling=SamplingParameters(1.0, max(lengths)), engine="none",
    )  # fmt: skip


def trl_selective(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    found: Tensor = selective_log_softmax((hidden @ weight.T)[None], targets[None])[0]
    return found


def trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As TRL's GRPO trainer asks for them: log-probs and entropy, 32,768 words of the vocabulary at a time."""
    from trl.kernels import ChunkedLogProbFunction

    asked = ("log_probs", "entropy")
    found: Tensor = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32_768, None, 1.0, asked)[0]
    return found


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "naive": naive,
    "TRL, full logits": trl_selective,
    "TRL, chunked": trl_chunked,
    "ours": ours,
    f"ours, {TF32}": ours,
}


def _logprobs(case: Case, device: torch.device) -> dict[str, Any]:
    config, method = (SHAPES | MINIATURES)[case.shape].config, WAYS[case.way]
    width, vocabulary = int(config["hidden_size"]), int(config["vocab_size"])
    hidden = torch.randn(case.tokens, width, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) * 0.05).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (case.tokens,), device=device)
    upstream = torch.randn(case.tokens, device=device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def both_ways() -> None:
        hidden.grad = weight.grad = None
        logprobs = method(hidden, weight, targets)
        logprobs.backward(upstream.to(logprobs.dtype))

    seconds, memory = _timed(both_ways, device)
    hidden.grad = weight.grad = None
    with torch.no_grad():
        found = method(hidden, weight, targets)
        torch.set_float32_matmul_precision("highest")
        rows = (slice(start, start + 256) for start in range(0, case.tokens, 256))
        difference = max(float((found[each] - naive(hidden[each], weight, targets[each])).abs().max()) for each in rows)
    return {"seconds": seconds, "memory": None if memory is None else memory - held, "difference": difference}


def _timed(run: Callable[[], None], device: torch.device) -> tuple[list[float], int | None]:
    """Seconds of each run after the first few, and the most bytes that were allocated meanwhile (on a GPU)."""
    seconds = []
    for number in range(WARM_UP + MEASURED):
        if number == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:], torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
