"""Soft Adaptive Policy Optimization (SAPO), Gao et al., arXiv 2511.20347, Eq. 5 and 6.

The paper maximises

    J = E[ 1/G sum_i 1/|y_i| sum_t f_it(r_it) A_i ],      r_it = pi_theta(y_it) / pi_old(y_it)
    f_it(x) = 4/tau_it * sigmoid(tau_it (x - 1)),         tau_it = tau_pos if A_i > 0 else tau_neg

Here is f; the two means are the weights of `sapo_learner.aggregation`. Since 4 sigmoid(2u) = 2 + 2 tanh(u), f is

    f(r) = 2/tau + (2/tau) tanh(tau (r-1) / 2),           f'(r) = sech^2(tau (r-1) / 2) = w

and we leave out the constant 2/tau: same gradient, and a loss that is 0 on-policy instead of depending on tau.

f'(1) = 1 whatever tau is, so on-policy the gradient is the plain policy gradient; away from r = 1 the gate w closes
smoothly, faster for larger tau. Pushing a token down (A < 0) raises every other logit a little, mostly of tokens nobody
wants, which is why tau_neg > tau_pos.
"""

import torch
from pydantic import Field

from sapo_learner.objectives import Objective, Surrogate, Tokens


class SAPO(Objective):
    """Diagnostics: `ratio` r; `gate` w = f'(r), the share of the importance-sampled gradient that passes, in (0, 1]."""

    source = "arXiv 2511.20347, Eq. 5 and 6"

    tau_pos: float = Field(default=1.0, gt=0)
    """Temperature of the gate where the advantage is positive."""
    tau_neg: float = Field(default=1.05, gt=0)
    """Temperature of the gate elsewhere."""

    def __call__(self, tokens: Tokens) -> Surrogate:
        advantages = tokens.masked_advantages
        ratio = tokens.log_ratio.exp()
        tau = torch.where(advantages > 0, torch.full_like(ratio, self.tau_pos), self.tau_neg)
        soft = torch.tanh(tau * (ratio - 1) / 2)
        gate = 1 - soft.detach() ** 2  # sech^2 = 1 - tanh^2
        return Surrogate(loss=-(2 / tau) * soft * advantages, diagnostics={"ratio": ratio.detach(), "gate": gate})
