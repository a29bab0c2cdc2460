"""What the order inside a response is needed for: functions of a [T] vector that stay within each response.

Ids may be any numbers and the responses may stand in any order; the tokens of one response stand in their own. Each
response is computed by itself, not cut out of one running sum over the pack: a threshold on the result must not flip
with the rounding errors of whoever happens to be packed in front.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def per_sequence(values: Tensor, sequence_ids: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """[T] `function` ([n] -> [n]) applied to the n values of each response, in their order. sequence_ids: [T] int64."""
    order = torch.argsort(sequence_ids, stable=True)
    _, lengths = torch.unique(sequence_ids, return_counts=True)  # sorted, as `order` is
    results = [function(part) for part in torch.split(values[order], lengths.tolist())]
    return torch.empty_like(values).index_put((order,), torch.cat([values[:0], *results]))


def sum_before(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """[T] sum of `values` [T] over the earlier tokens of the same response; 0 at its first."""
    return per_sequence(values, sequence_ids, lambda part: torch.cat([part.new_zeros(1), part[:-1].cumsum(0)]))


def min_before(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """[T] smallest of `values` [T] among the earlier tokens of the same response; +inf at its first."""
    return per_sequence(
        values,
        sequence_ids,
        lambda part: torch.cat([part.new_full((1,), torch.inf), part[:-1].cummin(0).values]),
    )


def quantile(values: Tensor, mask: Tensor, sequence_ids: Tensor, share: float) -> Tensor:
    """[T] the value below which `share` of the unmasked `values` [T] of the same response lie, linear in between; NaN
    where a response has none. mask: [T] bool."""
    unmasked = torch.where(mask, values, torch.nan)
    return per_sequence(unmasked, sequence_ids, lambda part: part.nanquantile(share).expand_as(part))
