"""Overlong filtering (DAPO, arXiv 2503.14476): drop responses that the token limit cut off.

    keep_i = y_i ended by itself

Their reward says little of what they would have become. Their siblings' advantages were made with them all the same.
"""

from torch import Tensor

from sapo_learner.filters import Filter, required
from sapo_learner.objectives import Tokens


class Overlong(Filter):
    source = "arXiv 2503.14476"

    def keep(self, tokens: Tokens) -> Tensor:
        return ~required(tokens.truncated, "truncated")
