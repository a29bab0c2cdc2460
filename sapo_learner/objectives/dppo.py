"""Divergence Proximal Policy Optimization (DPPO), arXiv 2602.04879, with a binary divergence.

    J = E[ ... sum_t keep_it r_it A_i ]
    keep_it = 0 where D_it > threshold and the update moves further away, else 1

The trust region bounds how far the token's probability has moved, not its ratio: p = pi_theta(y_it), q = pi_old(y_it),

    tv    D = |p - q|                                           threshold 0.2  in the paper's main runs
    kl    D = q log(q/p) + (1-q) log((1-q) / (1-p))             threshold 0.05

and an update moves further away where A > 0 and p > q, or A < 0 and p < q. The anchor is the policy that sampled.

Not exact: no top-k divergence, it needs the other tokens' log-probs. The authors' code also bounds r (10; verl 20,
in its examples 10000), which the formula does not: `ratio_cap`, off unless set, bounds value and gradient.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sapo_learner.objectives import Objective, Surrogate, Tokens

THRESHOLDS = {"tv": 0.2, "kl": 0.05}


def binary_divergence(tokens: Tokens, divergence: Literal["tv", "kl"]) -> Tensor:
    """[T] D of each token, without gradient, 0 at masked slots."""
    q, p = _probability(tokens, tokens.behaviour_logprobs), _probability(tokens, tokens.logprobs)
    if divergence == "tv":
        return (p - q).abs()
    rest = torch.log((1 - q + 1e-8) / (1 - p + 1e-8))  # 1e-8: the authors', for p = 1
    return (1 - q) * rest - q * tokens.log_ratio.detach()


def _probability(tokens: Tokens, logprobs: Tensor) -> Tensor:
    return torch.where(tokens.loss_mask, logprobs.detach().to(tokens.dtype), 0.0).clamp(max=0).exp()


class DPPO(Objective):
    """Diagnostics: `ratio` r; `divergence` D; `dropped`, 1 where keep is 0."""

    source = "arXiv 2602.04879"

    divergence: Literal["tv", "kl"] = "tv"
    """Total variation or Kullback-Leibler, of the distribution "this token or another one"."""
    threshold: float | None = Field(default=None, gt=0)
    """Divergence above which a token may not move further away; null = 0.2 for tv, 0.05 for kl."""
    ratio_cap: float | None = Field(default=None, gt=0)
    """Bound on the ratio, in value and gradient; null = none."""

    def __call__(self, tokens: Tokens) -> Surrogate:
        advantages, log_ratio = tokens.masked_advantages, tokens.log_ratio
        ratio = log_ratio.detach().exp()
        divergence = binary_divergence(tokens, self.divergence)
        threshold = THRESHOLDS[self.divergence] if self.threshold is None else self.threshold
        dropped = ((divergence > threshold) & (advantages * log_ratio.detach() > 0)).to(ratio.dtype)
        slope = (log_ratio - log_ratio.detach()).exp()  # 1, with the gradient of log r
        loss = -(1 - dropped) * ratio.clamp(max=self.ratio_cap or torch.inf) * slope * advantages
        return Surrogate(loss=loss, diagnostics={"ratio": ratio, "divergence": divergence, "dropped": dropped})
