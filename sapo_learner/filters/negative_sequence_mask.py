"""Negative sequence mask (ARLArena; DeepSeek-V3.2, Eq. 9): drop bad responses that the policy has already left.

    keep_i = A_i >= 0  or  d_i <= threshold,       d_i = 1/|y_i| sum_t (log pi_old - log pi_theta)

d_i is the mean over the response's unmasked tokens of the log ratio cut off at +-20. Under the objective "sapo" it is
ARLArena's repair of the gate that never closes below r = 1. DeepSeek-V3.2 and TRL (`get_off_policy_mask`) call the same
rule off-policy sequence mask. The threshold is ours to choose: ARLArena's is not known, 0.5 is the example in TRL.
"""

from torch import Tensor

from sapo_learner.filters import Filter
from sapo_learner.objectives import Tokens


class NegativeSequenceMask(Filter):
    source = "ARLArena, Table 1; DeepSeek-V3.2, Eq. 9"

    threshold: float = 0.5
    """Nats per token that the policy may have fallen below the behaviour policy; exactly that much is kept."""

    def keep(self, tokens: Tokens) -> Tensor:
        distance = -tokens.sequence_mean(tokens.log_ratio)
        return (tokens.masked_advantages >= 0) | (distance <= self.threshold)
