"""What run.yaml says to vLLM, and what is refused before vLLM is even imported. Runs without vLLM."""

from typing import Any

import pytest

from sapo_learner.config import parse
from sapo_learner.errors import ConfigError
from services.rollout.engines import PolicyVersion, vllm_adapter
from services.runtime.engine_settings import EngineSettings


def arguments(slots: int = 8, **vllm: Any) -> dict[str, Any]:
    settings = parse(EngineSettings, {"name": "vllm", "slots": slots, "vllm": vllm}, where="test")
    return vllm_adapter.engine_arguments(settings, dtype="bfloat16", mode="processed", context=4096)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_adapter, "on_cpu", lambda: False)


def test_what_a_user_sets_reaches_vllm(gpu: None) -> None:
    chosen = arguments(
        slots=64, dtype="float16", tensor_parallel_size=4, data_parallel_size=2, memory_fraction=0.8, max_model_len=512,
        chunked_prefill=True, quantization="fp8", kv_cache_gib=2, enforce_eager=True, arguments={"block_size": 32},
    )  # fmt: skip
    assert chosen.items() >= {
        "dtype": "float16", "max_num_seqs": 64, "tensor_parallel_size": 4, "data_parallel_size": 2,
        "gpu_memory_utilization": 0.8, "max_model_len": 512, "enable_chunked_prefill": True, "quantization": "fp8",
        "kv_cache_memory_bytes": 2 << 30, "enforce_eager": True, "block_size": 32,
    }.items()  # fmt: skip


def test_what_a_user_leaves_out_is_the_runs_or_vllms_own(gpu: None) -> None:
    chosen = arguments()
    assert (chosen["dtype"], chosen["max_model_len"], chosen["logprobs_mode"]) == (
        "bfloat16", 4096, "processed_logprobs"
    )  # fmt: skip
    assert not {"quantization", "enable_chunked_prefill", "kv_cache_memory_bytes"} & chosen.keys()


@pytest.mark.parametrize("name", ["logprobs_mode", "worker_extension_cls", "model", "weight_transfer_config"])
def test_what_log_probs_depend_on_cannot_be_changed_behind_the_runs_back(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is set by the rollout worker"):
        arguments(arguments={name: "other"})


def test_seeded_requests_are_not_cut_into_chunks_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_adapter, "on_cpu", lambda: True)
    assert arguments()["enable_chunked_prefill"] is False
    with pytest.raises(ConfigError, match="chunks"):
        arguments(chunked_prefill=True)


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", "1.0.0"])
def test_a_version_that_nobody_has_tested_is_refused_with_the_range(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(vllm_adapter, "_installed", lambda _: version)
    with pytest.raises(ConfigError, match=rf"vLLM {version} has not been tested; the tested range is <0.33,>=0.32"):
        vllm_adapter.require_vllm()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu"])
def test_a_tested_version_is_accepted(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(vllm_adapter, "_installed", lambda _: version)
    assert vllm_adapter.require_vllm() == version


def test_without_vllm_the_message_says_where_to_get_it() -> None:
    with pytest.raises(ConfigError, match=r"not installed here .*sapo\[vllm\]"):
        vllm_adapter.require_vllm("a_package_that_does_not_exist")


def test_nccl_is_not_available_yet() -> None:
    with pytest.raises(ConfigError, match="nccl is not available yet"):
        arguments(weight_transfer="nccl")


def test_a_policys_label_is_read_back() -> None:
    assert vllm_adapter.policy_of(vllm_adapter.label(PolicyVersion(12, 345))) == PolicyVersion(12, 345)
