"""Off-policy sequence mask (DeepSeek-V3.2, Eq. 9), under the name that TRL gives it (`get_off_policy_mask`).

Nothing differs from `negative_sequence_mask`: both keep a response if A_i >= 0 or if its mean of log pi_old - log
pi_theta is at most the threshold, with pi_old the policy that sampled. The name is here so that it is found.
"""

from sapo_learner.filters.negative_sequence_mask import NegativeSequenceMask


class OffPolicySequenceMask(NegativeSequenceMask):
    source = "DeepSeek-V3.2, Eq. 9"
