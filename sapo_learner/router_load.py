"""Where a mixture of experts sends its tokens: over all ranks, every token of a step that the loss is computed from.

    router_load_max       tokens of the busiest expert over the mean of its layer; the largest of any layer. 1 is even
    router_load_cv        standard deviation over mean of an expert's tokens, mean over layers. 0 is even
    router_idle_experts   share of experts without a token

transformers names the class of a model's routers: what it records as "router_logits". Their output is read by forward
hooks, which change nothing. A model without known routers, or whose routers do not say which experts they chose, has no
such figures.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from sapo_learner.parallel import Ranks

Figures = dict[str, dict[str, float]]


class RouterLoad:
    def __init__(self, model: Any | None) -> None:
        """model: whose rows hold no padding, which would be counted, too; None counts nothing."""
        self._counts: dict[int, Tensor] = {}  # by router, [experts] int64, on its device
        self._watching = self._counting = False
        for number, (router, index) in enumerate(_routers(model) if model is not None else ()):
            router.register_forward_hook(partial(self._note, number, index))

    @contextmanager
    def watching(self, *, counting: bool = True) -> Iterator[None]:
        """Around a forward pass: layers that are computed again for their gradient are not asked a second time.

        counting: whether its tokens count. Those of a rank that only takes part do not, but its routers must be known.
        """
        self._watching, self._counting = True, counting
        try:
            yield
        finally:
            self._watching = False

    def taken(self, ranks: Ranks) -> Figures:
        """Figures of all ranks' tokens since it was last asked; {} where nothing is known. Called on all ranks."""
        if not self._counts:
            return {}
        numbers = sorted(self._counts)
        counts = ranks.summed(torch.cat([self._counts[each].cpu() for each in numbers]))
        layers = torch.split(counts, [len(self._counts[each]) for each in numbers])
        self._counts = {}
        return figures(layers)

    def _note(self, number: int, index: int, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if not self._watching or (found := _choices(output, index)) is None:
            return
        chosen, experts = found
        if number not in self._counts:
            self._counts[number] = torch.zeros(experts, dtype=torch.int64, device=chosen.device)
        if self._counting:
            slots = chosen.flatten()
            self._counts[number].scatter_add_(0, slots, torch.ones_like(slots))


def figures(layers: tuple[Tensor, ...] | list[Tensor]) -> Figures:
    """layers: [experts] int64 each, how many tokens were sent to an expert."""
    loads = [counts.double() / counts.double().mean() for counts in layers if counts.any()]
    if not loads:
        return {}
    found = {
        "router_load_max": max(float(load.max()) for load in loads),
        "router_load_cv": sum(float(load.std(correction=0)) for load in loads) / len(loads),
        "router_idle_experts": float((torch.cat(loads) == 0).double().mean()),
    }
    return {name: {"all": value} for name, value in found.items()}


def _routers(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, int]]:
    """Routers in the order of layers, and which of their outputs are logits."""
    recorders = [
        each
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
        for each in _listed((part._can_record_outputs or {}).get("router_logits"))
    ]
    for name, module in model.named_modules():
        for each in recorders:
            where = f".{each.layer_name.strip('.')}." if each.layer_name else ""
            if each.target_class and isinstance(module, each.target_class) and where in f".{name}.":
                yield module, each.index
                break


def _listed(said: Any) -> list[OutputRecorder]:
    several = said if isinstance(said, list) else [said]
    return [each for each in several if isinstance(each, OutputRecorder)]


def _choices(output: Any, index: int) -> tuple[Tensor, int] | None:
    """[..., top_k] int64, the experts that each token is sent to, and how many there are; None if it is not clear."""
    if not isinstance(output, tuple):
        return None
    logits = output[index]
    for each in output:
        if isinstance(each, Tensor) and each.dtype == torch.int64 and each.shape[:-1] == logits.shape[:-1]:
            return each, int(logits.shape[-1])
    return None
