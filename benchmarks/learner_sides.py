"""Optimizer steps on the same recorded groups, as our learner does them and as TRL's GRPOTrainer does.

`ours` and `trl` begin with the same weights and have the same loss (SAPO, mean over tokens, then over responses),
float32, AdamW and gradient clipping. Neither checkpoints activations. Each step is on groups of its own; a step's time
begins with recorded groups and ends after the optimizer: advantages, batches, loss, backward, clipping, AdamW.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.memory import forget_peak, peak
from sapo_learner.advantages import step_advantages
from sapo_learner.batching import collate
from sapo_learner.config import LearnerSettings
from sapo_learner.learner import Learner
from sapo_learner.policy import Policy, tiny_policy
from sapo_learner.trajectory import SamplingParameters, Trajectory, TrajectoryGroup, VersionSpan

GROUP, PROMPT_TOKENS, LEARNING_RATE, BETA2 = 8, 32, 1e-5, 0.99
TAIL = 0.7  # standard deviation of log-lengths: the longest of 64 is 4.3 times the mean


@dataclass(frozen=True)
class Job:
    """responses: of a step. tokens: mean length of a response. microbatch_tokens: most of a forward pass, on both
    sides, on theirs with the padding."""

    lengths: str  # heavy-tailed | equal
    responses: int
    tokens: int
    hidden: int
    layers: int
    vocabulary: int
    microbatch_tokens: int


@dataclass(frozen=True)
class Step:
    """Of one optimizer step: CPU time (user and system), wall time, and the peak of memory above that before."""

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int


Timed = list[Step]


def response_lengths(job: Job) -> NDArray[np.int64]:
    """[responses], shortest first: all the same, or the quantiles of a log-normal distribution; the same mean."""
    if job.lengths == "equal":
        return np.full(job.responses, job.tokens)
    places = torch.tensor((np.arange(job.responses) + 0.5) / job.responses)
    shape = (TAIL * torch.special.ndtri(places)).exp().numpy()
    return np.maximum(1, np.rint(shape * job.tokens / shape.mean())).astype(np.int64)


def policy_of(job: Job) -> Policy:
    """A Qwen3 of that size at random weights."""
    tokenizer = tiny_policy("0123456789", seed=0).tokenizer
    config = Qwen3Config(
        vocab_size=job.vocabulary, hidden_size=job.hidden, num_hidden_layers=job.layers,
        num_attention_heads=job.hidden // 64, num_key_value_heads=max(1, job.hidden // 128), head_dim=64,
        intermediate_size=3 * job.hidden, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return Policy(AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer, {})


def recorded(job: Job, seed: int) -> list[TrajectoryGroup]:
    """Groups of GROUP random responses, each group with two different rewards at least; log-probs some way off the
    policy's, so that ratios are not 1."""
    random = np.random.default_rng(seed)
    lengths = random.permutation(response_lengths(job)).reshape(-1, GROUP)
    spread = 0 if job.lengths == "equal" else PROMPT_TOKENS // 4
    sampling = SamplingParameters(temperature=1.0, max_tokens=int(lengths.max()))

    def response(length: int, reward: float) -> Trajectory:
        logprobs = np.minimum(0, -np.log(job.vocabulary) + 0.3 * random.standard_normal(length))
        return Trajectory(
            token_ids=random.integers(3, job.vocabulary, length).astype(np.int32),
            behaviour_logprobs=logprobs.astype(np.float32), loss_mask=np.ones(length, np.bool_),
            spans=(VersionSpan(length, 0, 0),), rewards={"correct": reward}, finish_reason="stop",
        )  # fmt: skip

    def group(draw: int, lengths: NDArray[np.int64]) -> TrajectoryGroup:
        rewards = [1.0, 0.0, *random.integers(0, 2, GROUP - 2).astype(float).tolist()]
        prompt = random.integers(3, job.vocabulary, PROMPT_TOKENS + int(random.integers(-spread, spread + 1)))
        return TrajectoryGroup(
            draw=draw, attempt=1, task="recorded", prompt_id=str(draw), epoch=0, seed=draw,
            prompt_ids=prompt.astype(np.int32), sampling=sampling, engine="recorded",
            trajectories=tuple(response(int(each), reward) for each, reward in zip(lengths, rewards, strict=True)),
        )  # fmt: skip

    return [group(draw, each) for draw, each in enumerate(lengths)]


def ours(job: Job, steps: Sequence[list[TrajectoryGroup]], gradient: Path) -> Timed:
    """gradient: where that of the first step goes, before clipping, as one vector."""
    settings = LearnerSettings.model_validate(
        {
            "training": {"microbatch_tokens": job.microbatch_tokens},
            "advantages": {"std": "sample", "eps": 1e-4},
            "optimizer": {"learning_rate": LEARNING_RATE, "beta2": BETA2, "warmup_steps": 0},
        }
    )
    learner = Learner(policy_of(job), settings, temperature=1.0)
    clock, timed = Clock(), Timed()
    for number, groups in enumerate(steps):
        clock.start()
        advantages = step_advantages(groups, settings.advantages)
        batch = collate(groups, advantages, step=number, microbatch_tokens=job.microbatch_tokens)
        report = learner.step(batch)
        timed.append(clock.stop())
        assert report.applied
        if number == 0:  # what it was scaled down by is known
            torch.save(flat_gradient(learner.policy.model) * max(1.0, report.gradient_norm), gradient)
    return timed


def trl(job: Job, steps: Sequence[list[TrajectoryGroup]], gradient: Path) -> Timed:
    """TRL's own training loop; only sampling and rewards are left out: it is handed what was recorded, padded as it
    pads what it samples. gradient: as for `ours`."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer
    from trl.trainer.utils import pad

    clock, timed, remaining = Clock(), Timed(), iter(steps)

    class Recorded(GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Tensor]:
            return padded(next(remaining), pad, self._tokenizer.pad_token_id)

        def _clip_grad_norm(self, model: Any) -> Any:
            if not timed:
                torch.save(flat_gradient(model), gradient)
            return super()._clip_grad_norm(model)

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            timed.append(clock.stop())

    policy = policy_of(job)
    trainer = Recorded(
        model=policy.model, reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl_arguments(job, len(steps), gradient.parent), processing_class=policy.tokenizer,
        callbacks=[Stopwatch()], train_dataset=Dataset.from_dict({"prompt": ["0"] * (job.responses // GROUP)}),
    )  # fmt: skip
    assert not policy.model.is_activation_checkpointing
    trainer.train()
    return timed


def trl_arguments(job: Job, steps: int, scratch: Path) -> Any:
    from trl import GRPOConfig

    rows = rows_per_pass(job)
    return GRPOConfig(
        output_dir=str(scratch / "trl"), loss_type="sapo", max_steps=steps, num_generations=GROUP,
        per_device_train_batch_size=rows, gradient_accumulation_steps=job.responses // rows,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", adam_beta2=BETA2, max_grad_norm=1.0,
        max_completion_length=job.tokens, activation_checkpointing=False, bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_steps=10**6,
    )  # fmt: skip


def padded(groups: Sequence[TrajectoryGroup], pad: Callable[..., Tensor], pad_id: int) -> dict[str, Tensor]:
    """What GRPOTrainer makes of a batch that it has sampled: as long as the longest prompt and the longest response."""
    responses = [(group.prompt_ids, each) for group in groups for each in group.trajectories]
    prompts = [torch.from_numpy(ids.astype(np.int64)) for ids, _ in responses]
    completions = [torch.from_numpy(each.token_ids.astype(np.int64)) for _, each in responses]
    logprobs = [torch.from_numpy(each.behaviour_logprobs.copy()) for _, each in responses]
    rewards = torch.tensor([[each.reward for each in group.trajectories] for group in groups])
    centred = rewards - rewards.mean(1, keepdim=True)
    mask = pad([torch.ones_like(each) for each in completions], padding_value=0, padding_side="right")
    return {
        "prompt_ids": pad(prompts, padding_value=pad_id, padding_side="left"),
        "prompt_mask": pad([torch.ones_like(each) for each in prompts], padding_value=0, padding_side="left"),
        "completion_ids": pad(completions, padding_value=pad_id, padding_side="right"),
        "completion_mask": mask,
        "old_per_token_logps": pad(logprobs, padding_value=0.0, padding_side="right"),
        "advantages": (centred / (rewards.std(1, keepdim=True) + 1e-4)).flatten(),
        "num_items_in_batch": mask.sum(),
    }


def rows_per_pass(job: Job) -> int:
    """The most rows of the longest length that fit TRL's forward pass; its passes are equal in rows."""
    longest = int(response_lengths(job).max()) + PROMPT_TOKENS + (0 if job.lengths == "equal" else PROMPT_TOKENS // 4)
    fitting = [rows for rows in range(1, job.responses + 1) if rows * longest <= job.microbatch_tokens]
    return max([1, *(rows for rows in fitting if job.responses % rows == 0)])


def flat_gradient(model: Any) -> Tensor:
    return torch.cat([each.grad.flatten() for each in model.parameters()])


class Clock:
    def start(self) -> None:
        self._before = forget_peak()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> Step:
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        return Step(cpu, wall, peak() - self._before)
