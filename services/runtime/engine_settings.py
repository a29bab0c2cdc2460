"""Which inference engine rollout workers run, and what reaches it."""

from typing import Any, Literal

from pydantic import Field, field_validator

from sapo_learner.config import Settings


class VllmSettings(Settings):
    """What reaches vLLM. Its own defaults hold for what is null."""

    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """To compute in; empty: the one that policies are published in."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    data_parallel_size: int = Field(default=1, ge=1)
    memory_fraction: float = Field(default=0.9, gt=0, le=1)
    """Of a GPU's memory, for weights and cache together."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Size of the key-value cache; on a GPU what memory_fraction leaves, on a CPU 1."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Most tokens of prompt and response together; the model's context when null."""
    chunked_prefill: bool | None = None
    quantization: str | None = None
    enforce_eager: bool = False
    """No CUDA graphs. Always so on a CPU."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further engine arguments of vLLM, by their names in Python."""
    call_seconds: float = Field(default=120.0, gt=0)
    """Time limit of every call into vLLM, such as taking over new weights; beyond it the engine counts as dead."""
    weight_transfer: Literal["http", "nccl"] = "http"
    """How weights reach the engine. http: snapshots from the control plane. nccl: not available yet."""

    @field_validator("weight_transfer")
    @classmethod
    def _available(cls, name: str) -> str:
        if name != "http":
            raise ValueError(f"{name} is not available yet, use http")
        return name


class EngineSettings(Settings):
    name: Literal["torch", "vllm"] = "torch"
    """Which inference engine rollout workers run."""
    vllm: VllmSettings = VllmSettings()
    slots: int = Field(default=256, ge=1)
    """Responses decoded together by one worker."""
    threads: int = Field(default=1, ge=1)
    """torch threads of a rollout worker."""
