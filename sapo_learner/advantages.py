"""Rewards of a group -> advantages: how much better each response is than its siblings to the same prompt.

    A_i = (R_i - mean_j R_j) / (std_j R_j + eps)          GRPO arXiv 2402.03300 section 4.1.2; SAPO arXiv 2511.20347

The papers do not say which standard deviation; `AdvantageSettings.std` does. numpy only, no torch.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sapo_learner.config import AdvantageSettings
from sapo_learner.errors import InvalidTrajectory

#: Rewards closer together than this, relative to the largest, are equal: sums of components differ by rounding.
EQUAL = 1e-12


def group_advantages(rewards: ArrayLike, settings: AdvantageSettings) -> NDArray[np.float64]:
    """[G] float64 advantages of the [G] rewards of one group; sum 0.

    All zeros, exactly, where there is nothing to compare: one response, or rewards that are all equal. (Divided by eps
    alone, rounding errors would become advantages.)
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 1 or len(rewards) == 0 or not np.isfinite(rewards).all():
        raise InvalidTrajectory(f"rewards of a group must be one vector of finite numbers, got {rewards}")
    if np.ptp(rewards) <= EQUAL * np.abs(rewards).max():  # one response: 0 <= anything
        return np.zeros_like(rewards)
    centred: NDArray[np.float64] = rewards - rewards.mean()
    if settings.std == "none":
        return centred
    spread = centred.std(ddof=1 if settings.std == "sample" else 0)
    advantages: NDArray[np.float64] = centred / (spread + settings.eps)
    return advantages


def has_signal(advantages: NDArray[np.float64]) -> bool:
    """Whether a group with these advantages moves the policy at all."""
    return bool((advantages != 0).any())
