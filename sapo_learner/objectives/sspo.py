"""SSPO-style, after arXiv 2602.19327: the geometric mean of soft gates weighs a response. Experimental.

The paper's: a response's weight is the geometric mean of soft gates of its token ratios, between GMPO and SAPO; v1 has
a sigmoid, v3 an arctan of the log ratio. Ours, because only summaries could be read: scale and temperatures, such that
h(1) = 1 and h'(1) = 1, so that on-policy it is the policy gradient and for tau -> 0 arctan is GSPO without its clip.

    J = E[ 1/G sum_i A_i exp( 1/|y_i| sum_t log h(r_it) ) ],      tau = tau_pos if A_i > 0 else tau_neg
    arctan    h(r) = exp( arctan(tau log r) / tau )               bounded by exp(+-pi / (2 tau))
    sigmoid   h(r) = 1 + 4/tau sigmoid(tau (r-1)) - 2/tau = 1 + 2/tau tanh(tau (r-1) / 2)
"""

from typing import Literal

import torch
from pydantic import Field

from sapo_learner.objectives import Objective, Surrogate, Tokens


class SSPO(Objective):
    """Diagnostics, on all tokens of y_i: `weight`, the geometric mean of the gates."""

    source = "arXiv 2602.19327 (summaries)"
    status = "experimental"

    gate: Literal["arctan", "sigmoid"] = "arctan"
    """The gate h."""
    tau_pos: float = Field(default=1.0, ge=0.01)
    """Temperature of the gate where the advantage is positive."""
    tau_neg: float = Field(default=1.05, ge=0.01)
    """Temperature of the gate elsewhere."""

    def __call__(self, tokens: Tokens) -> Surrogate:
        advantages, log_ratio = tokens.masked_advantages, tokens.log_ratio
        tau = torch.where(advantages > 0, torch.full_like(log_ratio, self.tau_pos), self.tau_neg)
        if self.gate == "arctan":
            log_gate = torch.atan(tau * log_ratio) / tau
        else:
            log_gate = torch.log1p(2 / tau * torch.tanh(tau * (log_ratio.exp() - 1) / 2))
        weight = tokens.sequence_mean(log_gate).exp()
        return Surrogate(loss=-weight * advantages, diagnostics={"weight": weight.detach()})
