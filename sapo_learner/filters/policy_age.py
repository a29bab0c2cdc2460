"""Policy age: drop tokens that were sampled too many optimizer steps ago.

    keep_t = age_t <= max_age

Per token, so that of a response with new weights in its middle the younger part stays. `training.max_policy_age` bounds
the age of what is sampled at all; this is for training on less of it. A plain bound, from no paper.
"""

from pydantic import Field
from torch import Tensor

from sapo_learner.filters import Filter, required
from sapo_learner.objectives import Tokens


class PolicyAge(Filter):
    max_age: int = Field(default=4, ge=0)
    """Optimizer steps between the policy that sampled a token and this update; exactly that many are kept."""

    def keep(self, tokens: Tokens) -> Tensor:
        return required(tokens.policy_age, "policy_age") <= self.max_age
