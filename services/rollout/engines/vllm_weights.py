"""Runs inside vLLM's worker processes: takes a policy from a safetensors file, in two phases.

`update_weights` reads and checks the whole file and changes nothing; only `finish_weight_update` touches the model, so
whatever is wrong with the file leaves the old policy whole. Registered with vLLM when this module is imported, which
`worker_extension_cls` has every worker do. Importing it also ties these processes' lives to the rollout worker's.
"""

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from services.rollout.engines.vllm_adapter import OWNER, TRANSFER

WATCH_SECONDS = 1.0


@dataclass
class FileInit(WeightTransferInitInfo):
    """There is nothing to connect to."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    path: str


class FileTransfer(WeightTransferEngine[FileInit, FileUpdate]):
    """Weights of a whole policy from a file that every worker can read."""

    init_info_cls, update_info_cls = FileInit, FileUpdate
    supports_draft_weight_update = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._staged: dict[str, torch.Tensor] = {}

    def init_transfer_engine(self, init_info: FileInit) -> None:
        pass

    def start_weight_update(self) -> None:
        """Nothing yet: a model between two policies may not be left to chance."""

    def receive_weights(self, update_info: FileUpdate) -> None:
        staged = load_file(update_info.path)
        for name, tensor in staged.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"tensor {name!r} of {Path(update_info.path).name} is not finite")
        self._staged = staged

    def finish_weight_update(self) -> None:
        staged, self._staged = self._staged, {}
        if self.device.type == "cpu":
            _repack_experts(self.model)
        initialize_layerwise_reload(self.model)
        self.model.load_weights(iter(staged.items()))
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _repack_tied(self.model)

    def shutdown(self) -> None:
        pass


def _repack_experts(model: torch.nn.Module) -> None:
    """On CPUs, vLLM packs the experts of a mixture only when there is no kernel for them yet, and would go on with
    the old policy's. Without this, every log-prob after an update is wrong, and nothing says so."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None  # type: ignore[union-attr]


def _repack_tied(model: torch.nn.Module) -> None:
    """An output projection that is tied to the embedding gets no weights of its own, so vLLM does not pack it anew: on
    a CPU it would go on computing with its packed copy of the old policy's."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel():
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


class SapoWorker:
    """vLLM wants a class to extend its workers with; importing it is all that is needed."""


def _die_with_owner() -> None:
    """vLLM's processes would outlive a rollout worker that is killed, with all the memory that they hold."""
    parents = {each.pid: each for each in psutil.Process().parents()}
    owner = parents.get(int(os.environ.get(OWNER, 0)))
    if owner is None:  # this is the rollout worker itself, or another machine's
        return
    doomed = [each for each in parents.values() if owner in each.parents()] + [psutil.Process()]

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE:
                time.sleep(WATCH_SECONDS)
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    threading.Thread(target=watch, name="die-with-owner", daemon=True).start()


_die_with_owner()
if TRANSFER not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(TRANSFER, FileTransfer)
