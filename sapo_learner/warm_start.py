"""A base policy from nothing, for runs without a model: supervised on a task's demonstrations in two phases.

1. Clean demonstrations until the policy solves held-out problems: that accuracy is the ceiling RL can restore.
2. Demonstrations with a bad habit mixed in until pass@1 is low: the base that RL starts from.

Measured on at least `samples` sampled responses at temperature 1, every held-out problem equally often.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sapo_learner.config import WarmStartSettings
from sapo_learner.errors import SapoError
from sapo_learner.policy import Policy

Demonstrate = Callable[[random.Random, bool], tuple[str, str]]  # (generator, habit) -> (prompt, response)
Correct = Callable[[int, str, bool], bool]  # (held-out problem, response text, ended by itself) -> correct


@dataclass(frozen=True)
class Accuracy:
    """pass@1 at temperature 1: the mean over `samples` responses and its standard error."""

    mean: float
    standard_error: float
    samples: int


@dataclass(frozen=True)
class WarmStartReport:
    """Accuracy before the bad habit (`ceiling`) and after it (`base`), and the steps each phase took."""

    ceiling: Accuracy
    base: Accuracy
    clean_steps: int
    habit_steps: int

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def warm_start(
    policy: Policy,
    demonstrate: Demonstrate,
    prompts: Sequence[str],
    correct: Correct,
    settings: WarmStartSettings,
    *,
    seed: int,
    progress: Callable[[str, int, int], None] = lambda phase, step, limit: None,
) -> WarmStartReport:
    """Train `policy` in place. Raises SapoError when a phase misses its target within its step limit."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    clean_steps = 0
    ceiling = Accuracy(0.0, 0.0, 0)
    while ceiling.mean < settings.clean_target:
        _within(clean_steps, settings.clean_limit, "clean", f"accuracy {ceiling.mean:.3f} < {settings.clean_target}")
        count = settings.clean_steps if clean_steps == 0 else settings.clean_extra_steps
        rate = settings.clean_learning_rate * (1.0 if clean_steps == 0 else 0.25)
        _supervise(policy, demonstrate, generator, count, rate, settings.batch, 0.0,
                   lambda step: progress("clean", clean_steps + step, settings.clean_limit))  # fmt: skip
        clean_steps += count
        ceiling = measure(policy, prompts, correct, settings.samples)
    habit_steps, base = 0, ceiling
    while base.mean > settings.habit_target:
        _within(habit_steps, settings.habit_limit, "habit", f"pass@1 {base.mean:.3f} > {settings.habit_target}")
        _supervise(policy, demonstrate, generator, settings.habit_steps, settings.habit_learning_rate, settings.batch,
                   settings.habit_share, lambda step: progress("habit", habit_steps + step, settings.habit_limit))  # fmt: skip
        habit_steps += settings.habit_steps
        base = measure(policy, prompts, correct, settings.samples)
    return WarmStartReport(ceiling, base, clean_steps, habit_steps)


def _within(done: int, limit: int, phase: str, state: str) -> None:
    if done >= limit:
        raise SapoError(
            f"the {phase} phase of the warm start ended after {done} steps with {state}",
            fix=f"raise policy.warm_start.{phase}_limit or try another seed",
        )


def _supervise(
    policy: Policy,
    demonstrate: Demonstrate,
    generator: random.Random,
    steps: int,
    learning_rate: float,
    batch: int,
    habit_share: float,
    progress: Callable[[int], None],
) -> None:
    """Cross-entropy on responses, AdamW, learning rate falling linearly to a tenth."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    policy.model.train()
    for step in range(steps):
        pairs = [demonstrate(generator, generator.random() < habit_share) for _ in range(batch)]
        input_ids, attention_mask, labels = _demonstrations(policy, pairs)
        hidden = policy.hidden(input_ids, attention_mask)[:, :-1]
        logits = functional.linear(hidden, policy.head_weight, policy.head_bias)
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1)
    policy.model.eval()


def _demonstrations(policy: Policy, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """[B, L] input ids, attention mask, and labels (-100 where there is nothing to learn)."""
    end = policy.tokenizer.eos_token_id
    rows = []
    for prompt, response in pairs:
        prompt_ids = policy.tokenizer.encode(prompt)
        rows.append((len(prompt_ids), [*prompt_ids, *policy.tokenizer.encode(response, add_special_tokens=False), end]))
    width = max(len(ids) for _, ids in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    labels = torch.full((len(rows), width), -100)
    for index, (prompt_length, ids) in enumerate(rows):
        input_ids[index, : len(ids)] = torch.tensor(ids)
        attention_mask[index, : len(ids)] = True
        labels[index, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
    return input_ids, attention_mask, labels


@torch.no_grad()
def measure(policy: Policy, prompts: Sequence[str], correct: Correct, samples: int, max_tokens: int = 12) -> Accuracy:
    """pass@1 over at least `samples` responses, the same number for every prompt."""
    repeats = math.ceil(samples / len(prompts))
    policy.tokenizer.padding_side = "left"
    inputs = policy.tokenizer(list(prompts), return_tensors="pt", padding=True)
    solved: list[bool] = []
    for _ in range(repeats):
        output = policy.model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_tokens,
        )  # fmt: skip
        answers = output[:, inputs["input_ids"].shape[1] :]
        ended = (answers == policy.tokenizer.eos_token_id).any(dim=1).tolist()
        texts = policy.tokenizer.batch_decode(answers, skip_special_tokens=True)
        solved += [correct(index, text, end) for index, (text, end) in enumerate(zip(texts, ended, strict=True))]
    mean = sum(solved) / len(solved)
    return Accuracy(mean, math.sqrt(mean * (1 - mean) / len(solved)), len(solved))
