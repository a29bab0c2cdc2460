"""DPPO mask (arXiv 2602.04879), binary form: drop tokens that are far away and being pushed further.

    keep_t = 0 where D_t > threshold and the update moves further away, else 1

D and the rule are those of the objective `dppo`, which multiplies the plain ratio by this mask. Over another objective,
such as `sapo`, it is our combination.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from sapo_learner.filters import Filter
from sapo_learner.objectives import Tokens
from sapo_learner.objectives.dppo import DPPO


class DPPOMask(Filter):
    source = "arXiv 2602.04879"

    divergence: Literal["tv", "kl"] = "tv"
    """Total variation or Kullback-Leibler, of the distribution "this token or another one"."""
    threshold: float | None = Field(default=None, gt=0)
    """Divergence above which a token may not move further away; null = 0.2 for tv, 0.05 for kl."""

    def keep(self, tokens: Tokens) -> Tensor:
        objective = DPPO(divergence=self.divergence, threshold=self.threshold)
        return objective(tokens).diagnostics["dropped"] == 0
