"""Chunked log-probs against log_softmax over the whole [T, V] tensor, and the promise that no such tensor exists."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sapo_learner.logprobs import token_logprobs

torch.set_num_threads(1)
T, H, V = 23, 6, 41  # 23 is prime: the last chunk is always a part


def inputs(dtype: torch.dtype = torch.float64, rows: int = T) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(rows, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(V, (rows,), generator=generator)
    return hidden, weight, bias, targets


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, bias: Tensor | None) -> Any:
    logits = hidden @ weight.T
    logprobs = torch.log_softmax((logits if bias is None else logits + bias) / temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1).detach()
    return logprobs.gather(1, targets[:, None]).squeeze(1), entropy


def upstream(rows: int, dtype: torch.dtype) -> Tensor:
    """A gradient from above that differs per token and has both signs."""
    return torch.linspace(-2, 1, rows, dtype=dtype)


@pytest.mark.parametrize("chunk_size", [1, 7, 23, 512])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("with_bias", [False, True])
def test_float64_equals_log_softmax(chunk_size: int, temperature: float, with_bias: bool) -> None:
    hidden, weight, bias, targets = inputs()
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    extra = bias if with_bias else None
    expected, expected_entropy = naive(hidden, weight, targets, temperature, extra)
    logprobs, entropy = token_logprobs(
        hidden, weight, targets, temperature=temperature, chunk_size=chunk_size, bias=extra
    )
    assert entropy is not None
    assert not entropy.requires_grad
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-12)
    g = upstream(T, torch.float64)
    ours, theirs = torch.autograd.grad(logprobs @ g, leaves), torch.autograd.grad(expected @ g, leaves)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "grad_tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_narrow_inputs_are_computed_in_float32(dtype: torch.dtype, grad_tolerance: float) -> None:
    """Against float64 on the same (already rounded) numbers: only the gradients are rounded to the input's dtype."""
    hidden, weight, bias, targets = inputs(dtype)
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight, bias)]
    expected, expected_entropy = naive(wide[0], wide[1], targets, 0.8, wide[2])
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature=0.8, chunk_size=5, bias=bias)
    assert entropy is not None
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=5e-6)
    g = upstream(T, torch.float32)
    ours = torch.autograd.grad(logprobs @ g, [hidden, weight, bias])
    theirs = torch.autograd.grad(expected @ g.double(), wide)
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), right, rtol=grad_tolerance, atol=5e-6)


def test_weight_gradient_is_summed_in_float32() -> None:
    """4096 equal contributions: a bfloat16 sum stops growing once one of them is below half its last place."""
    rows = 4096
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = token_logprobs(hidden, weight, torch.zeros(rows, dtype=torch.int64), chunk_size=1)
    (gradient,) = torch.autograd.grad(logprobs.sum(), weight)
    assert gradient.flatten().tolist() == [rows / 2, -rows / 2]


def test_mixed_dtypes_and_autocast() -> None:
    hidden, weight, _, targets = inputs(torch.float32)
    exact, _ = token_logprobs(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, _ = token_logprobs(hidden, weight, targets)
    assert torch.equal(under_autocast, exact)
    narrow = hidden.detach().bfloat16().requires_grad_()
    logprobs, _ = token_logprobs(narrow, weight, targets)
    gradients = torch.autograd.grad(logprobs.sum(), [narrow, weight])
    assert [each.dtype for each in gradients] == [torch.bfloat16, torch.float32]
    assert logprobs.dtype == torch.float32


def test_gradcheck() -> None:
    hidden, weight, bias, targets = inputs(rows=5)

    def logprobs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return token_logprobs(hidden, weight, targets, temperature=1.3, chunk_size=2, bias=bias)[0]

    assert torch.autograd.gradcheck(logprobs, (hidden, weight, bias))


def test_tied_embedding_adds_both_gradients() -> None:
    _, weight, _, targets = inputs()
    tokens = targets.roll(1)
    ours, _ = token_logprobs(torch.tanh(weight[tokens]), weight, targets, chunk_size=4)
    theirs, _ = naive(torch.tanh(weight[tokens]), weight, targets, 1.0, None)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), weight), torch.autograd.grad(theirs.sum(), weight), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_inputs_get_no_gradient(frozen: str) -> None:
    hidden, weight, bias, targets = inputs()
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves[frozen].requires_grad_(False)
    logprobs, _ = token_logprobs(hidden, weight, targets, bias=bias)
    expected, _ = naive(hidden, weight, targets, 1.0, bias)
    logprobs.sum().backward()
    ours = {name: leaf.grad for name, leaf in leaves.items()}
    assert ours.pop(frozen) is None
    rest = [leaf for name, leaf in leaves.items() if name != frozen]
    torch.testing.assert_close(list(ours.values()), list(torch.autograd.grad(expected.sum(), rest)), rtol=0, atol=1e-12)


def test_no_token_at_all() -> None:
    hidden, weight, _, targets = inputs(rows=0)
    logprobs, entropy = token_logprobs(hidden, weight, targets)
    assert entropy is not None
    assert logprobs.shape == entropy.shape == (0,)
    gradients = torch.autograd.grad(logprobs.sum(), [hidden, weight])
    assert gradients[0].shape == (0, H)
    assert (gradients[1] == 0).all()


def test_entropy_is_optional_and_large_logits_are_fine() -> None:
    hidden, weight, _, targets = inputs(torch.float32)
    with_it, _ = token_logprobs(hidden, weight, targets)
    without, entropy = token_logprobs(hidden, weight, targets, with_entropy=False)
    assert entropy is None
    assert torch.equal(with_it, without)
    logprobs, entropy = token_logprobs(hidden * 1e4, weight, targets)
    assert entropy is not None
    assert logprobs.isfinite().all()
    assert entropy.min() >= -1e-6
    assert all(each.isfinite().all() for each in torch.autograd.grad(logprobs.sum(), [hidden, weight]))


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"temperature": -1.0}, {"chunk_size": 0}])
def test_refuses_nonsense(wrong: dict[str, Any]) -> None:
    hidden, weight, _, targets = inputs()
    with pytest.raises(ValueError, match="must be > 0"):
        token_logprobs(hidden, weight, targets, **wrong)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.numel())
        return result


def test_never_a_tensor_of_tokens_by_vocabulary() -> None:
    rows, vocabulary, chunk_size = 64, 200, 4
    hidden = torch.randn(rows, H, requires_grad=True)
    weight = torch.randn(vocabulary, H, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,))
    saved: list[int] = []
    with (
        LargestTensor() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
    ):
        logprobs, _ = token_logprobs(hidden, weight, targets, chunk_size=chunk_size)
        logprobs.sum().backward()
    assert weight.grad is not None
    limit = max(vocabulary * H, chunk_size * vocabulary)
    assert largest.numel <= limit < rows * vocabulary / 4
    assert max(saved) <= vocabulary * H  # the weight itself
    with LargestTensor() as largest:
        naive(hidden, weight, targets, 1.0, None)
    assert largest.numel == rows * vocabulary  # the probe does see one
