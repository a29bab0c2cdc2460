"""FSDP2: every rank holds a share of each weight, gradient and optimizer moment, and gathers a layer when it runs.

    mesh  [shard]             all ranks share one copy of the weights
    mesh  [replicate, shard]  hybrid: `shard` ranks (those of one node, say) share a copy, gradients are summed over all

Weights are float32 where the optimizer sees them (float64 stays float64), whatever a pass computes in, and gradients
are summed in float32. They are summed, not averaged: weights per token are global (I8). gloo knows only sums, too.

One more module stands above the model: what it computes, from ids to log-probs, is the root of the sharding, so that
the output projection is whole while log-probs are computed from it, chunk by chunk, forward and backward.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from sapo_learner.config import ParallelSettings
from sapo_learner.errors import ConfigError
from sapo_learner.hidden_states import cannot_pack, packs
from sapo_learner.packed_logprobs import PackedLogprobs
from sapo_learner.parallel import Ranks
from sapo_learner.policy import Policy
from sapo_learner.snapshot import LazyTensors


@dataclass(frozen=True)
class ShardedPolicy(Policy):
    """A policy of which this rank holds a share; its tensors are DTensors, its methods are called on all ranks."""

    root: PackedLogprobs = field(kw_only=True)
    ranks: Ranks = field(kw_only=True)
    settings: ParallelSettings = field(kw_only=True)

    @property
    def device(self) -> torch.device:
        return torch.device(next(self.model.parameters()).device)

    def copied(self, dtype: str) -> Mapping[str, Tensor]:
        """Whole tensors in `dtype` on rank 0's CPU, put together one at a time; nothing on the others."""
        target = getattr(torch, dtype)
        return gathered(
            LazyTensors(self.tensors(), lambda _, each: each.to(target) if each.is_floating_point() else each),
            keep=self.ranks.first,
        )

    @contextmanager
    def rounded(self, dtype: str) -> Iterator[None]:
        """While it lasts, the weights are what publishing in `dtype` leaves of them; costs a copy of this rank's."""
        own = {name: _local(tensor) for name, tensor in self.tensors().items() if tensor.is_floating_point()}
        target = getattr(torch, dtype)
        kept = {name: each.clone() for name, each in own.items() if each.dtype != target}
        with torch.no_grad():
            for name in kept:
                own[name].copy_(own[name].to(target))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, each in kept.items():
                    own[name].copy_(each)


def mesh_of(ranks: Ranks, settings: ParallelSettings, device: torch.device) -> DeviceMesh:
    """Raises ConfigError for a number of ranks that cannot be laid out so."""
    shard = settings.shard or ranks.size
    if ranks.size % shard:
        fits = [each for each in range(1, ranks.size + 1) if ranks.size % each == 0]
        raise ConfigError(
            f"{ranks.size} ranks cannot share copies of the weights {shard} by {shard}",
            where="parallel.shard", fix=f"set it to one of {', '.join(map(str, fits))}, or start {shard} times as many",
        )  # fmt: skip
    if shard == ranks.size:
        return init_device_mesh(device.type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (ranks.size // shard, shard), mesh_dim_names=("replicate", "shard"))


def sharded(
    shape: Policy, ranks: Ranks, settings: ParallelSettings, device: torch.device, weights: Mapping[str, Tensor] | None
) -> ShardedPolicy:
    """Shard a policy whose model may hold no weights yet (see `empty_policy`); called on all ranks.

    weights: every tensor of `Policy.tensors`, on rank 0; None elsewhere. Each is sent to where it belongs, one at a
    time. Raises ConfigError for a model or a number of ranks that cannot be sharded.
    """
    check_shardable(shape)
    mesh, layers = mesh_of(ranks, settings, device), layers_of(shape)
    root = PackedLogprobs(shape)
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if settings.precision == "bfloat16" else None, reduce_dtype=_reduce_dtype(shape)
    )
    for module in (*layers, root):
        fully_shard(module, mesh=mesh, mp_policy=precision)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    _allocate(shape.model, device)
    policy = ShardedPolicy(shape.model, shape.tokenizer, shape.files, root=root, ranks=ranks, settings=settings)
    distribute(policy.tensors(), weights, ranks)
    return policy


def check_shardable(policy: Policy) -> None:
    """Raises ConfigError, saying what to change."""
    if not packs(policy):
        raise _not_packed(policy, "the log says why")
    if policy.frozen_base is not None:
        raise ConfigError(
            "adapters are trained by one process, in float32", where="policy.lora", fix="set parallel.processes to 1 "
            "and parallel.precision to float32, or leave policy.lora out",
        )  # fmt: skip
    layers_of(policy)


def check_shape(policy: Policy) -> None:
    """The part of it that needs no weights, for a policy that packing was not tried on."""
    if reason := cannot_pack(policy):
        raise _not_packed(policy, reason)
    layers_of(policy)


def _not_packed(policy: Policy, reason: str) -> ConfigError:
    return ConfigError(
        f"{type(policy.model).__name__} cannot be trained in packed rows ({reason}), so not by several ranks or in "
        "another precision", where="policy.source", fix="set parallel.processes to 1 and parallel.precision to float32",
    )  # fmt: skip


def layers_of(policy: Policy) -> list[torch.nn.Module]:
    """The layers of a model, outermost ones. Raises ConfigError where transformers does not tell."""
    found = [each for each in policy.model.modules() if isinstance(each, GradientCheckpointingLayer)]
    inner = {id(part) for each in found for part in each.modules() if part is not each}
    layers = [each for each in found if id(each) not in inner]
    if not layers:
        raise ConfigError(
            f"{type(policy.model).__name__} does not say what its layers are, so they can neither be sharded nor "
            "computed again", where="policy.source", fix="train it with parallel.processes: 1 and "
            "parallel.activation_checkpointing: false, or choose another model",
        )  # fmt: skip
    return layers


def checkpoint_activations(policy: Policy) -> None:
    """Keep only what goes into each layer, and compute the layer again for its gradient."""
    for layer in layers_of(policy):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


@torch.no_grad()
def distribute(own: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None, ranks: Ranks) -> None:
    """Fill `own`, on all ranks with the same names, from whole tensors on rank 0."""
    for name, tensor in own.items():
        device = _local(tensor).device
        if ranks.first:
            assert weights is not None
            source = weights[name].detach().to(device, tensor.dtype)
        else:
            source = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if isinstance(tensor, DTensor):
            part = distribute_tensor(source, tensor.device_mesh, tensor.placements)
            _local(tensor).copy_(part.to_local())
        else:
            dist.broadcast(source, src=0)
            tensor.copy_(source)


def root_of(policy: Policy) -> PackedLogprobs:
    """What computes the policy's log-probs; of a sharded one, all ranks must run it."""
    return policy.root if isinstance(policy, ShardedPolicy) else PackedLogprobs(policy)


def compute_dtype(policy: Policy) -> torch.dtype:
    """What a forward and backward pass computes in."""
    if isinstance(policy, ShardedPolicy) and policy.settings.precision == "bfloat16":
        return torch.bfloat16
    return policy.head_weight.dtype


def gathered(tensors: Mapping[str, Tensor], *, keep: bool = True) -> Mapping[str, Tensor]:
    """Whole tensors as copies on the CPU, put together one at a time; called on all ranks. keep: if not, none."""
    found = {}
    for name in tensors:
        complete = whole(tensors[name])
        if keep:
            found[name] = complete.to("cpu", copy=True)
    return found


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    """This rank's share of it, the memory itself."""
    share = tensor.detach()
    return share.to_local() if isinstance(share, DTensor) else share


def _reduce_dtype(policy: Policy) -> torch.dtype:
    dtype: torch.dtype = next(policy.model.parameters()).dtype
    return torch.promote_types(dtype, torch.float32)


def _allocate(model: torch.nn.Module, device: torch.device) -> None:
    """Memory for parameters that are on the meta device; tied ones stay tied. `to_empty` would also empty buffers."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                empty = made.get(id(parameter))
                if empty is None:
                    empty = torch.nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                    made[id(parameter)] = empty
                module._parameters[name] = empty
    for module in model.modules():  # where there were no weights yet, FSDP could not put them there itself
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
