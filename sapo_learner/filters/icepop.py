"""IcePop-type mask: drop tokens whose importance ratio lies outside a band, on either side and for any advantage.

    keep_t = low <= r_t <= high,       r_t = pi_theta(y_t) / pi_old(y_t)

As implemented in slime (`icepop_function`) and NeMo-RL, with two differences. Their r is proximal over behaviour
policy; here nothing stands between current and behaviour policy, so r is the objective's own ratio. And they weigh what
they keep by r, which the objective has done already: here it is a mask. The bounds are those commonly quoted; no source
was verified.
"""

from pydantic import Field, model_validator
from torch import Tensor

from sapo_learner.filters import Filter
from sapo_learner.objectives import Tokens


class IcePop(Filter):
    source = "slime, NeMo-RL"

    low: float = Field(default=0.5, ge=0)
    """Smallest ratio that is kept."""
    high: float = Field(default=5.0, gt=0)
    """Largest ratio that is kept."""

    @model_validator(mode="after")
    def _band(self) -> "IcePop":
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}: nothing would be kept")
        return self

    def keep(self, tokens: Tokens) -> Tensor:
        ratio = tokens.log_ratio.exp()
        return (ratio >= self.low) & (ratio <= self.high)
