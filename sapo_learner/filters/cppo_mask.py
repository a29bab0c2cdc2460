"""CPPO mask (arXiv 2606.10968): the binary-TV mask of DPPO with a budget over the prefix of the response.

    keep_t = A (r_t - 1) <= 0  or  w_t D_t <= c_t

w, D, c and the rule are those of the objective `cppo`, which multiplies the plain ratio by this mask. Over another
objective, such as `sapo`, it is our combination.
"""

from pydantic import Field
from torch import Tensor

from sapo_learner.filters import Filter
from sapo_learner.objectives import Tokens
from sapo_learner.objectives.cppo import CPPO


class CPPOMask(Filter):
    source = "arXiv 2606.10968"

    threshold: float = Field(default=0.15, gt=0)
    """Most that w D of one token may be; the paper's 0.15 for dense models, 0.2 for mixtures of experts."""
    budget: float = Field(default=0.015, ge=0)
    """What each token of the prefix adds to the allowance, times its w; the paper's for post-trained models."""
    weight_min: float = Field(default=0.8, ge=0, le=1)
    """w of a response's last token; its first has 1."""

    def keep(self, tokens: Tokens) -> Tensor:
        return CPPO(**self.model_dump())(tokens).diagnostics["dropped"] == 0
