"""Hidden states -> log-prob of each token and entropy of each distribution, without ever holding a [T, V] tensor.

    logits = (hidden @ head_weight^T + bias) / temperature          [T, V], at most `chunk_size` rows at a time
    logprob_t = logits_t[target_t] - logsumexp(logits_t)
    entropy_t = - sum_v p_tv log p_tv

The forward pass keeps one number per token (the logsumexp) and the backward pass computes the logits again. At
T = 8192, V = 151936 one float32 [T, V] tensor takes 4.6 GiB and autograd would hold several; 512 rows take 0.3 GiB.

Everything is computed in float32 (float64 stays float64): rounding logits to bfloat16 moves log-probs by some 0.03
nats, which importance ratios would read as policy change. Products of two bfloat16 are exact in float32, and in TF32
too, so `torch.set_float32_matmul_precision("high")` costs a bfloat16 forward pass no accuracy.

Shape letters: T = packed tokens, H = hidden size, V = vocabulary, C = rows of a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int = 512,
    bias: Tensor | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [T] of `targets`, in nats, with gradient; entropy [T] in nats without gradient, or None.

    hidden: [T, H]; head_weight: [V, H]; bias: [V]; any float dtypes, gradients come back in them.
    targets: [T] int64, each in [0, V), masked tokens too. temperature: of the sampling distribution, > 0.
    chunk_size: how many rows of logits are alive at a time.
    Both results are float32, or float64 if an input is.
    """
    if temperature <= 0 or chunk_size < 1:
        raise ValueError(f"temperature {temperature} must be > 0 and chunk_size {chunk_size} >= 1")
    with torch.autocast(hidden.device.type, enabled=False):  # it would quietly make the products 16-bit again
        logprobs, entropy = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden, head_weight, bias, targets, 1.0 / temperature, chunk_size, with_entropy
        )
    return logprobs, entropy if with_entropy else None


class _TokenLogprobs(torch.autograd.Function):
    """d logprob_t / d logits_tv = 1[v = target_t] - p_tv, and from there two matrix products per chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        inverse_temperature: float,
        chunk_size: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        head = _Head(hidden, head_weight, bias, inverse_temperature)
        logprobs = torch.empty_like(targets, dtype=head.dtype)
        normaliser, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for rows in _chunks(len(hidden), chunk_size):
            logits = head.logits(hidden[rows])  # [C, V]
            normaliser[rows] = logits.logsumexp(dim=-1)
            all_logprobs = logits.sub_(normaliser[rows, None])
            logprobs[rows] = all_logprobs.gather(1, targets[rows, None]).squeeze(1)
            if with_entropy:  # every term has the same sign: logsumexp - sum p * logit would cancel, even below 0
                entropy[rows] = -torch.linalg.vecdot(all_logprobs.exp(), all_logprobs)
        ctx.save_for_backward(hidden, head_weight, bias, targets, normaliser)
        ctx.inverse_temperature, ctx.chunk_size = inverse_temperature, chunk_size
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head_weight, bias, targets, normaliser = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        head = _Head(hidden, head_weight, bias, ctx.inverse_temperature)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Summed over all tokens, therefore kept wide until the end.
        grad_weight = torch.zeros_like(head_weight, dtype=head.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=head.dtype) if needs_bias else None
        for rows in _chunks(len(hidden), ctx.chunk_size):
            grad = grad_logprobs[rows, None] * ctx.inverse_temperature  # [C, 1], with respect to the undivided logits
            grad_logits = head.logits(hidden[rows]).sub_(normaliser[rows, None]).exp_().mul_(-grad)  # [C, V]
            grad_logits.scatter_add_(1, targets[rows, None], grad)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_logits @ head.weight).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, hidden[rows].to(head.dtype))
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        if grad_weight is not None:
            grad_weight = grad_weight.to(head_weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


class _Head:
    """The output layer in the dtype that everything is computed in; a 16-bit weight is widened once, not per chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, inverse_temperature: float) -> None:
        self.dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        self.weight = weight.to(self.dtype)  # [V, H]
        self.bias = None if bias is None else bias.to(self.dtype)
        self.inverse_temperature = inverse_temperature

    def logits(self, hidden: Tensor) -> Tensor:
        """[C, V] logits of [C, H] hidden states, divided by the temperature; a fresh tensor."""
        logits = torch.nn.functional.linear(hidden.to(self.dtype), self.weight, self.bias)
        return logits.mul_(self.inverse_temperature)


def _chunks(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, rows, size))
