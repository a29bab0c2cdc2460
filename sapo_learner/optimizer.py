"""One update of the weights by AdamW: its learning rate, the clipped gradient, and what is refused."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sapo_learner.config import OptimizerSettings
from sapo_learner.memory import enough_memory
from sapo_learner.sharding import whole


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Rate of the update after `step` others: linear warm-up, then constant, linear or cosine to the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = min(1.0, (step - settings.warmup_steps) / max(1, steps - 1 - settings.warmup_steps))
    remaining = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * (settings.final_fraction + (1 - settings.final_fraction) * remaining)


def update(
    optimizer: torch.optim.Optimizer, model: Any, rate: float, loss: float, *, max_grad_norm: float, where: str
) -> tuple[float, str]:
    """Clip and update, unless something is not finite; returns the gradient norm and the reason for refusing.

    Called on all ranks: the norm is that of the whole gradient. Raises Unavailable when memory runs out.
    """
    parameters = {name: each for name, each in model.named_parameters() if each.grad is not None}
    total = whole(torch.nn.utils.get_total_norm([each.grad for each in parameters.values()]))
    norm = float(total)
    if not math.isfinite(loss) or not math.isfinite(norm):
        reason = f"{_culprit(loss, parameters)} is not finite (loss {loss}, gradient norm {norm})"
        return norm, f"{reason}; weights and optimizer are left unchanged"
    torch.nn.utils.clip_grads_with_norm_(parameters.values(), max_grad_norm, total)
    for group in optimizer.param_groups:
        group["lr"] = rate
    with enough_memory("applying the update", where=where, fix="the optimizer holds two more copies of the weights"):
        optimizer.step()
    return norm, ""


def _culprit(loss: float, parameters: Mapping[str, Tensor]) -> str:
    """What to name when an update is refused; before clipping, which would spread a NaN over every gradient."""
    if not math.isfinite(loss):  # then so is every gradient behind it
        return "the loss"
    bad = (name for name, each in parameters.items() if each.grad is not None and not whole(each.grad).isfinite().all())
    return next((f"the gradient of {name}" for name in bad), "the sum of squared gradients")
