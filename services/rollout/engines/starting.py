"""Starts the engine that run.yaml names, serving a policy that has been fetched."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from sapo_learner.manifest import Manifest
from sapo_learner.policy import describe_policy, load_policy, load_weights
from services.rollout.engines import Engine, PolicyVersion
from services.rollout.engines.torch_engine import TorchEngine
from services.runtime.settings import RunConfig


class Fetched(Protocol):
    """Where the blobs of a manifest lie."""

    def write_model_directory(self, manifest: Manifest, *, weights: bool) -> Path: ...
    def tensors(self, manifest: Manifest) -> Mapping[str, Tensor]:
        """Verified. Raises Mismatch."""


@dataclass(frozen=True)
class Started:
    engine: Engine
    tokenizer: Any


async def start_engine(config: RunConfig, store: Fetched, manifest: Manifest, policy: PolicyVersion) -> Started:
    """Raises Mismatch for a snapshot that is damaged, ConfigError for one that the engine cannot serve."""
    return await (_vllm if config.engine.name == "vllm" else _torch)(config, store, manifest, policy)


async def _torch(config: RunConfig, store: Fetched, manifest: Manifest, version: PolicyVersion) -> Started:
    tensors = await asyncio.to_thread(store.tensors, manifest)
    directory = store.write_model_directory(manifest, weights=False)
    policy = await asyncio.to_thread(load_policy, directory, weights=False)
    load_weights(policy, tensors)
    return Started(TorchEngine(policy, version, slots=config.engine.slots), policy.tokenizer)


async def _vllm(config: RunConfig, store: Fetched, manifest: Manifest, policy: PolicyVersion) -> Started:
    """vLLM reads the weights itself, from the same files."""
    from services.rollout.engines.vllm_engine import VllmEngine  # vLLM needs an environment of its own

    await asyncio.to_thread(store.tensors, manifest)  # verifies every digest
    directory = store.write_model_directory(manifest, weights=True)
    description = describe_policy(directory)
    shapes = {name: entry.shape for name, entry in manifest.tensors.items()}
    try:
        engine = await VllmEngine.start(
            directory, description, shapes, policy, settings=config.engine, dtype=manifest.dtype,
            mode=config.sampling.logprob_mode, scratch=directory.parent,
        )  # fmt: skip
    finally:
        for path in directory.glob("*.safetensors"):
            path.unlink()  # the engine has them
    return Started(engine, description.tokenizer)
