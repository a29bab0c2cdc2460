"""Floating-point operations that a step's gradient needs, and the share of what the hardware could do (MFU).

After Chowdhery et al., "PaLM" (arXiv 2204.02311), appendix B: a matrix product costs 2 FLOPs per weight and token
forward and 4 backward, attention 12 H Q per layer, token and token of its sequence:

    step = 6 N tokens + 6 V H targets + sum over sequences and layers of 12 H Q length^2

Here N are the weights that a token is multiplied with: without embeddings, and of experts only as many as a token is
sent to (active parameters). The output projection (V x H) runs on response tokens alone. Weights that are not trained
(under LoRA) cost 4 instead of 6. As in the paper, attention counts the whole square, though half of it is masked, and
what is computed again, looked ahead or computed under a reference policy counts nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapo_learner.batching import Microbatch
from sapo_learner.policy import Policy

_H100 = {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12}
_A100 = {torch.bfloat16: 312e12, torch.float16: 312e12, torch.float32: 19.5e12}
_PEAKS = {
    "NVIDIA H200": _H100,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA L40S": {torch.bfloat16: 362e12, torch.float16: 362e12, torch.float32: 91.6e12},
    "NVIDIA L4": {torch.bfloat16: 121e12, torch.float16: 121e12, torch.float32: 30.3e12},
}
"""FLOP/s by device name and dtype, dense, from NVIDIA's data sheets (H100 SXM, H200 SXM, A100, L40S, L4)."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_CHOSEN = ("num_experts_per_tok", "top_k_experts")

Layers = tuple[tuple[int, int | None], ...]


@dataclass(frozen=True)
class ModelFlops:
    """What a model costs; multiplied with the tokens of a step by `of_step`."""

    per_token: float
    per_target: float
    attention: Layers
    """Of each layer with softmax attention: FLOPs per pair of tokens, and the window of its attention, if any."""

    @classmethod
    def of(cls, policy: Policy) -> "ModelFlops | None":
        """None where the model's configuration does not say how many heads it has, or how many of its experts a token
        is sent to."""
        model = policy.model
        config = model.config.get_text_config()
        head = policy.head_weight
        outside = {id(head)} | {
            id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
        }
        weights = {name: each for name, each in model.named_parameters() if each.ndim > 1 and id(each) not in outside}
        experts = {name for name in weights if ".experts." in name}
        share = _active_share(config) if experts else 1.0
        hidden = not experts and (_first(config, _EXPERTS) or 0) > 1
        if share is None or hidden or not isinstance(getattr(config, "num_attention_heads", None), int):
            return None
        per_token = sum(_cost(each) * (share if name in experts else 1.0) for name, each in weights.items())
        return cls(per_token, _cost(head), _attention(config))

    def of_step(self, microbatches: Sequence[Microbatch]) -> float:
        """Of all ranks together."""
        tokens = sum(len(each.input_ids) for each in microbatches)
        targets = sum(len(each.targets) for each in microbatches)
        lengths = [length for each in microbatches for length in each.lengths]
        pairs = {
            window: sum(length * min(length, window or length) for length in lengths)
            for window in {window for _, window in self.attention}
        }
        attended = sum(cost * pairs[window] for cost, window in self.attention)
        return self.per_token * tokens + self.per_target * targets + attended


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of one device computing in `dtype`; None where the data sheet is not known here."""
    if device.type != "cuda" or (dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"):
        return None
    return _PEAKS.get(torch.cuda.get_device_name(device), {}).get(dtype)


def _cost(weight: Tensor) -> float:
    return (6.0 if weight.requires_grad else 4.0) * weight.numel()


def _active_share(config: Any) -> float | None:
    experts, chosen = _first(config, _EXPERTS), _first(config, _CHOSEN)
    return chosen / experts if experts and chosen else None


def _first(config: Any, names: Sequence[str]) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _attention(config: Any) -> Layers:
    heads: int = config.num_attention_heads
    size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries, values = (getattr(config, name, None) or size for name in ("qk_head_dim", "v_head_dim"))
    cost, window = 6 * heads * (queries + values), getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return ((cost, window),) * int(config.num_hidden_layers)
    windows = {"full_attention": None, "sliding_attention": window}
    return tuple((cost, windows[kind]) for kind in kinds if kind in windows)
