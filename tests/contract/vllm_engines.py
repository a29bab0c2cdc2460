"""Real vLLM engines for the contract tests, kept from test to test: one for each architecture."""

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from sapo_learner.policy import Policy, PolicyDescription, write_policy
from services.rollout.engines import PolicyVersion
from services.runtime.engine_settings import EngineSettings

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM lives in an environment of its own: make test-vllm"
)
FEW = 2
"""Up to so many slots an engine is started with exactly as many; any other has room for MANY."""
MANY = 256
_running: dict[tuple[str, int], Any] = {}
_started: list[Any] = []  # vLLMs, in that order


async def vllm_engine(policy: Policy, slots: int, *, anew: bool = False) -> Any:
    """A new VllmEngine, around a vLLM that has served other policies of this architecture before, or a new one."""
    from services.rollout.engines.vllm_engine import VllmEngine

    shapes = {name: tuple(tensor.shape) for name, tensor in policy.tensors().items()}
    description = PolicyDescription(policy.tokenizer, policy.end_ids, policy.vocabulary, policy.context)
    settings = EngineSettings(name="vllm", slots=slots if slots <= FEW else MANY)
    key = (json.dumps([type(policy.model).__name__, shapes], sort_keys=True), settings.slots)
    scratch = Path(tempfile.mkdtemp(prefix="sapo-vllm-"))
    known = _running.get(key)
    if anew or known is None or known._ended is not None:
        write_policy(policy, scratch / "model")
        _running[key] = await VllmEngine.start(
            scratch / "model", description, shapes, PolicyVersion(0, 0), settings=settings, dtype="float32",
            mode="processed", scratch=scratch,
        )  # fmt: skip
        _started.append(_running[key]._llm)
        return _running[key]
    engine = VllmEngine(known._llm, description, shapes, PolicyVersion(0, 0), scratch, settings, policy.context)
    _running[key] = engine
    await engine.update_weights(policy.tensors(), PolicyVersion(0, 0))
    return engine


async def newest_engine(policy: Policy) -> Any:
    """Around the vLLM that was started last: it takes the others' metrics out of the process, also when it has
    ended; then there is a new one, with this policy."""
    newest = next((each for each in _running.values() if each._llm is _started[-1]), None)
    if newest is None or newest._ended is not None:
        return await vllm_engine(policy, MANY, anew=True)
    return newest


def engine_cores(process: psutil.Process) -> list[psutil.Process]:
    """Of the vLLMs that a process has started, oldest first."""
    return sorted(filter(_is_core, process.children(recursive=True)), key=psutil.Process.create_time)


def _is_core(process: psutil.Process) -> bool:
    try:
        return "EngineCore" in process.name() or "EngineCore" in " ".join(process.cmdline())
    except psutil.Error:  # it is ending
        return False
