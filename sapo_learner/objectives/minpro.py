"""MinPRO-style, after arXiv 2601.22718: the smallest earlier ratio stands for the prefix. Experimental.

The paper's: an importance ratio for token t should also correct for the prefix that led there; their product over the
prefix explodes, so the smallest of the earlier token ratios stands for it. Ours, because only the abstract could be
read: the weight is a constant, nothing is clipped, and the first token has weight 1.

    J = E[ ... sum_t m_it r_it A_i ],      m_it = sg[ min_{j<t} r_ij ],  m_i1 = 1;  at most 1 with `capped`
"""

import torch

from sapo_learner.objectives import Objective, Surrogate, Tokens
from sapo_learner.sequences import min_before


class MinPRO(Objective):
    """Diagnostics: `ratio` r; `prefix` m."""

    source = "arXiv 2601.22718 (abstract)"
    status = "experimental"

    capped: bool = False
    """Whether the prefix may only ever lower a token's weight."""

    def __call__(self, tokens: Tokens) -> Surrogate:
        log_ratio = tokens.log_ratio
        smallest = min_before(torch.where(tokens.loss_mask, log_ratio.detach(), torch.inf), tokens.sequence_ids)
        prefix = torch.where(smallest.isinf(), 0.0, smallest).clamp(max=0.0 if self.capped else torch.inf).exp()
        ratio = log_ratio.exp()
        loss = -prefix * ratio * tokens.masked_advantages
        return Surrogate(loss=loss, diagnostics={"ratio": ratio.detach(), "prefix": prefix})
