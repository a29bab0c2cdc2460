"""GSPO-token, Zheng et al., arXiv 2507.18071, section 4.3: GSPO whose advantage may differ from token to token.

    J    = E[ 1/G sum_i 1/|y_i| sum_t min( s_it A_it, clip(s_it, 1 - clip_low, 1 + clip_high) A_it ) ]
    s_it = sg[ s_i ] * pi_theta(y_it) / sg[ pi_theta(y_it) ],      s_i = exp( 1/|y_i| sum_t log r_it )

sg stops the gradient: s_it has the value of s_i and the slope of its own token. Where the advantage is constant over a
response, value and gradient are GSPO's under aggregation sequence_mean; take plain `gspo` there.
"""

import torch

from sapo_learner.objectives import Surrogate, Tokens
from sapo_learner.objectives.gspo import GSPO


class GSPOToken(GSPO):
    """Options of gspo. Diagnostics: `ratio` s_i on all tokens of y_i; `clipped`, 1 where the clip took the gradient."""

    source = "arXiv 2507.18071, section 4.3"

    def __call__(self, tokens: Tokens) -> Surrogate:
        advantages, log_ratio = tokens.masked_advantages, tokens.log_ratio
        log_ratio_of_response = tokens.sequence_mean(log_ratio).detach()
        ratio = (log_ratio_of_response + log_ratio - log_ratio.detach()).exp()
        plain = ratio * advantages
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages
        diagnostics = {"ratio": ratio.detach(), "clipped": (clipped < plain).to(ratio.dtype)}
        return Surrogate(loss=-torch.minimum(plain, clipped), diagnostics=diagnostics)
