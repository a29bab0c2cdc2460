"""CPPO, arXiv 2606.10968: DPPO's mask with a budget over the prefix.

    J = E[ ... sum_t keep_it r_it A_i ],      keep_it = 1 if A_i (r_it - 1) <= 0 or w_t D_it <= c_it, else 0
    c_it = min( threshold, threshold + budget sum_{j<t} w_j - sum_{j<t} w_j D_ij )
    w_t  = 1 - (1 - weight_min) (t - 1) / (|y_i| - 1),      D = |p - q|, binary total variation as in dppo

What the prefix has already moved is taken off what a token may still move: c can be negative, and then no token that
moves further away is kept. Sums run over the unmasked tokens of the response, kept or not; t counts them.

Not exact: read as text with a verl pull request that was still open. The top-20 divergence needs other tokens'
log-probs, and the per-response budget of the paper's base models (a quantile of D) is not here.
"""

from pydantic import Field

from sapo_learner.objectives import Objective, Surrogate, Tokens
from sapo_learner.objectives.dppo import binary_divergence
from sapo_learner.sequences import sum_before


class CPPO(Objective):
    """Diagnostics: `ratio` r; `allowed` c; `dropped`, 1 where keep is 0."""

    source = "arXiv 2606.10968"

    threshold: float = Field(default=0.15, gt=0)
    """Most that w D of one token may be; the paper's 0.15 for dense models, 0.2 for mixtures of experts."""
    budget: float = Field(default=0.015, ge=0)
    """What each token of the prefix adds to the allowance, times its w; the paper's for post-trained models."""
    weight_min: float = Field(default=0.8, ge=0, le=1)
    """w of a response's last token; its first has 1."""

    def __call__(self, tokens: Tokens) -> Surrogate:
        advantages, ratio, ids = tokens.masked_advantages, tokens.log_ratio.exp(), tokens.sequence_ids
        unmasked = tokens.loss_mask.to(ratio.dtype)
        place = sum_before(unmasked, ids) / (tokens.sequence_lengths - 1).clamp(min=1)
        weight = unmasked * (1 - (1 - self.weight_min) * place)
        moved = weight * binary_divergence(tokens, "tv")
        left = self.threshold + self.budget * sum_before(weight, ids) - sum_before(moved, ids)
        allowed = left.clamp(max=self.threshold)
        further = advantages * (ratio.detach() - 1) > 0
        dropped = (further & (moved > allowed)).to(ratio.dtype)
        diagnostics = {"ratio": ratio.detach(), "allowed": allowed, "dropped": dropped}
        return Surrogate(loss=-(1 - dropped) * ratio * advantages, diagnostics=diagnostics)
