"""Soft Adaptive Policy Optimization (SAPO), Gao et al., arXiv 2511.20347, Eq. 5 and 6.

The paper maximises

    J = E[ 1/G sum_i 1/|y_i| sum_t f_it(r_it) A_i ],      r_it = pi_theta(y_it) / pi_old(y_it)
    f_it(x) = 4/tau_it * sigmoid(tau_it (x - 1)),         tau_it = tau_pos if A_i > 0 else tau_neg

Here is f; the two means are the weights of `sapo_learner.aggregation`. f itself, its derivative w = f'(r) and the other
gates of arXiv 2602.19345 are in `sapo_learner.gates`; we leave out the constant f(1): same gradient, and a loss that is
0 on-policy instead of depending on tau. The gradient of a token is -A r w.

w(1) = 1 whatever tau is, so on-policy the gradient is the plain policy gradient; away from r = 1 the gate w closes
smoothly, faster for larger tau. Pushing a token down (A < 0) raises every other logit a little, mostly of tokens nobody
wants, which is why tau_neg > tau_pos.

`positive_ramp` is ours and experimental, no part of either paper. With q = min(1, policy age / age_full):

    tau_it  ->  (1 + 9 q) tau_it    where r has already moved the way A pushes: A > 0 and r > 1, or A < 0 and r < 1
    A_i     ->  (1 - q_i) A_i       where A_i < 0; q_i is that of the response's oldest token

At age 0 it is SAPO, bit for bit; from age_full on only responses with A > 0 count, at 10 tau_pos above r = 1.
"""

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sapo_learner.gates import GATES, GateName
from sapo_learner.objectives import Objective, Surrogate, Tokens

PRESETS = {"paper": {"tau_pos": 1.0, "tau_neg": 1.05}, "sharp": {"tau_pos": 10.0, "tau_neg": 12.0}}


class SAPO(Objective):
    """Diagnostics: `ratio` r; `gate`, the share of the importance-sampled gradient that passes, in [0, 1]: w, with
    positive_ramp times the weight of A < 0."""

    source = "arXiv 2511.20347, Eq. 5 and 6; gates arXiv 2602.19345"

    gate: GateName = "sigmoid"
    """The form of f: sigmoid is the paper's, the others are arXiv 2602.19345's."""
    tau_pos: float = Field(default=1.0, gt=0)
    """Temperature of the gate where the advantage is positive."""
    tau_neg: float = Field(default=1.05, gt=0)
    """Temperature of the gate elsewhere."""
    preset: Literal["paper", "sharp"] | None = Field(default=None, exclude=True)
    """Sets both temperatures: paper 1 and 1.05, sharp 10 and 12; one that is given wins. A resolved configuration shows
    the numbers in its place."""
    positive_ramp: bool = False
    """Experimental, ours: with the policy age close the gate outwards and fade out negative advantages."""
    age_full: int = Field(default=4, ge=1)
    """Policy age, in optimizer steps, from which positive_ramp acts in full. An age that is unknown counts as 0."""

    @model_validator(mode="before")
    @classmethod
    def _temperatures(cls, options: dict[str, Any]) -> dict[str, Any]:
        return PRESETS.get(str(options.get("preset")), {}) | options

    def __call__(self, tokens: Tokens) -> Surrogate:
        advantages = tokens.masked_advantages
        ratio = tokens.log_ratio.exp()
        tau = torch.where(advantages > 0, torch.full_like(advantages, self.tau_pos), self.tau_neg)
        weight = torch.ones_like(advantages)
        if self.positive_ramp:
            tau, weight = self._ramp(tokens, ratio.detach(), tau)
        f, slope = GATES[self.gate](ratio.detach() - 1, tau)
        f = f + slope * (ratio - ratio.detach())  # + 0, whose derivative is f' as it stands: none of f's rounding
        return Surrogate(loss=-f * weight * advantages, diagnostics={"ratio": ratio.detach(), "gate": slope * weight})

    def _ramp(self, tokens: Tokens, ratio: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """[T] temperatures and weights at the tokens' ages."""
        advantages = tokens.masked_advantages
        age = torch.zeros_like(advantages) if tokens.policy_age is None else tokens.policy_age.to(advantages.dtype)
        q = (age / self.age_full).clamp(0, 1)
        outward = (ratio - 1) * advantages > 0
        weight = torch.where(advantages < 0, 1 - tokens.sequence_max(q), 1.0)
        return torch.where(outward, (1 + 9 * q) * tau, tau), weight
