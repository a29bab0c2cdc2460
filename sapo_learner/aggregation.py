"""One weight per token over the whole optimizer step, so that the loss of a microbatch is a plain weighted sum.

    loss = (token_weights(tokens, mode, counts) * surrogate.loss).sum()

The denominators count the step, not the microbatch. Gradients of microbatches and of data-parallel ranks therefore add
up (sum, not mean) to the gradient of one big batch, however the responses are split and packed; only a response must
not be cut in two.

    sequence_mean   1 / (N |y_i|)    mean over tokens, then over responses     SAPO arXiv 2511.20347 Eq. 5, GRPO, GSPO
    token_mean      1 / sum_i |y_i|  mean over all tokens                      DAPO arXiv 2503.14476
    constant        1 / (N length)   a constant in place of |y_i|              Dr. GRPO arXiv 2503.20783

N counts responses with at least one unmasked token, |y_i| the unmasked tokens of one. A masked token weighs 0 and
raises no other's weight.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sapo_learner.objectives import Tokens

Mode = Literal["sequence_mean", "token_mean", "constant"]


@dataclass(frozen=True)
class StepCounts:
    """Denominators of a whole optimizer step: add up those of all its microbatches and ranks.

    sequences: responses with at least one unmasked token. tokens: unmasked tokens.
    """

    sequences: int
    tokens: int

    def __add__(self, other: "StepCounts") -> "StepCounts":
        return StepCounts(self.sequences + other.sequences, self.tokens + other.tokens)


def count(loss_mask: Tensor, sequence_ids: Tensor) -> StepCounts:
    """Counts of these tokens. loss_mask: [T] bool. sequence_ids: [T] int64."""
    return StepCounts(sequences=len(torch.unique(sequence_ids[loss_mask])), tokens=int(loss_mask.sum()))


def token_weights(tokens: Tokens, mode: Mode, counts: StepCounts | None = None, *, length: int | None = None) -> Tensor:
    """[T] weights in `tokens.dtype`, without gradient, 0 at masked tokens; over the whole step they sum to 1 (means).

    counts: of the whole step; without them `tokens` are the whole step. length: only for "constant", tokens.
    """
    counts = counts or count(tokens.loss_mask, tokens.sequence_ids)
    ones = torch.ones_like(tokens.loss_mask, dtype=tokens.dtype)
    match mode, length:
        case "sequence_mean", None:
            denominators = counts.sequences * tokens.sequence_lengths
        case "token_mean", None:
            denominators = counts.tokens * ones
        case "constant", int(constant) if constant > 0:
            denominators = counts.sequences * constant * ones
        case _:
            raise ValueError(f"mode {mode!r} with length {length}: 'constant' needs one > 0, the means take none")
    return torch.where(tokens.loss_mask, 1 / denominators, 0.0)  # a masked token may divide by 0: the mask hides it
