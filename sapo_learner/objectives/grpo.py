"""Group Relative Policy Optimization (GRPO), Shao et al., arXiv 2402.03300, Eq. 3, without its KL term.

    J = E[ 1/G sum_i 1/|y_i| sum_t min( r_it A_i, clip(r_it, 1 - clip_low, 1 + clip_high) A_i ) ]

The clip acts on one side only: for A > 0 above 1 + clip_high, for A < 0 below 1 - clip_low. Its relatives are settings:

    DAPO (arXiv 2503.14476)       clip_high 0.28, aggregation token_mean
    Dr. GRPO (arXiv 2503.20783)   aggregation constant, advantages.std none
    dual clip (arXiv 1912.09729)  for A < 0 the objective is at least dual_clip * A: what is far off-policy stops there
"""

import torch
from pydantic import Field

from sapo_learner.objectives import Objective, Surrogate, Tokens


class GRPO(Objective):
    """Diagnostics: `ratio` r; `clipped`, 1 where the clip took the gradient; `dual_clipped` likewise, when it is on."""

    source = "arXiv 2402.03300, Eq. 3"

    clip_low: float = Field(default=0.2, ge=0, le=1)
    """Width of the band below 1: the bound is 1 - clip_low."""
    clip_high: float = Field(default=0.2, ge=0)
    """Width of the band above 1: the bound is 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound on the ratio where the advantage is negative; null = none."""

    def __call__(self, tokens: Tokens) -> Surrogate:
        advantages = tokens.masked_advantages
        ratio = tokens.log_ratio.exp()
        plain = ratio * advantages
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages
        objective = torch.minimum(plain, clipped)
        diagnostics = {"ratio": ratio.detach(), "clipped": (clipped < plain).to(ratio.dtype)}
        if self.dual_clip is not None:
            floor = self.dual_clip * advantages
            cut = (advantages < 0) & (objective < floor)
            objective = torch.where(cut, floor, objective)
            diagnostics["dual_clipped"] = cut.to(ratio.dtype)
        return Surrogate(loss=-objective, diagnostics=diagnostics)
