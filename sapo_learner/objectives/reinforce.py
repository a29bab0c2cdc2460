"""REINFORCE, Williams, Machine Learning 8 (1992), with a group's advantage as its baseline.

    grad J = E[ sum_t w_it A_i grad log pi_theta(y_it) ],      w_it = 1, or min(r_it, ratio_cap), a constant

Plain (w = 1) it is right on-policy only: it takes no notice of who sampled the token. With `ratio_cap` it is off-policy
REINFORCE under truncated importance sampling.

Only the gradient means something. We differentiate -w A log r instead of -w A log pi_theta, which is the same gradient
and a loss that is 0 on-policy. Not exact: beyond |log r| = 20 a token has no gradient, as under every objective here.
"""

from pydantic import Field

from sapo_learner.objectives import Objective, Surrogate, Tokens


class REINFORCE(Objective):
    """Diagnostics: `ratio` r, which the plain form ignores; `capped`, 1 where ratio_cap acted, when it is on."""

    source = "Williams 1992, doi 10.1007/BF00992696"

    ratio_cap: float | None = Field(default=None, gt=0)
    """Weight every token by its importance ratio, at most this; null = weight 1."""

    def __call__(self, tokens: Tokens) -> Surrogate:
        log_ratio = tokens.log_ratio
        ratio = log_ratio.detach().exp()
        loss = -tokens.masked_advantages * log_ratio
        if self.ratio_cap is None:
            return Surrogate(loss=loss, diagnostics={"ratio": ratio})
        capped = (ratio > self.ratio_cap).to(ratio.dtype)
        diagnostics = {"ratio": ratio, "capped": capped}
        return Surrogate(loss=ratio.clamp(max=self.ratio_cap) * loss, diagnostics=diagnostics)
