"""The learner as several processes: rank 0 is the service, the others follow it.

torchrun --nproc-per-node 8 -m services.cli serve learner       on every rank; only rank 0 speaks to other services

All ranks run the same training session: the same steps of the same log, checkpoints and snapshots that each has a share
of. What only rank 0 can know, it tells the others (`sapo_learner.parallel.Ranks`).
"""

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from sapo_learner.empty_policy import empty_policy
from sapo_learner.errors import SapoError
from sapo_learner.hidden_states import packs, use_packing
from sapo_learner.parallel import SAID, Ranks, device_of_rank, joined, launched, together
from sapo_learner.policy import Policy
from sapo_learner.sharding import check_shardable, checkpoint_activations, sharded
from services.learner.session import TrainingSession
from services.runtime.lifecycle import say_why
from services.runtime.logging import of_run
from services.runtime.settings import RunConfig


@dataclass(frozen=True)
class Orders:
    """What a rank must know to take part."""

    config: RunConfig
    token: int
    files: Mapping[str, bytes]
    """The small ones of the policy's model directory."""
    packs: bool
    """Whether the policy's model runs on packed rows."""
    run: str
    """What the run is called in logs."""


def follows() -> bool:
    """Whether this process is one of torchrun's, and not the first."""
    return launched() and int(os.environ["RANK"]) > 0


def needs_group(config: RunConfig) -> bool:
    """Whether the policy is sharded, be it over one rank: for several, on a GPU, for passes in another precision."""
    plain = config.policy.lora is not None or device_of_rank().type == "cpu"
    return launched() or config.parallel.precision != "float32" or not plain


def prepare(config: RunConfig) -> None:
    """What every rank does before anything else."""
    torch.set_num_threads(config.training.threads)
    gpu = device_of_rank().type == "cuda"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS has no deterministic kernels
    # A GPU lacks some kernels: those are said once, and the run goes on.
    torch.use_deterministic_algorithms(config.training.deterministic, warn_only=gpu)
    # On is a search for bugs, which costs time in every step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if config.parallel.precision == "bfloat16" and gpu:
        # Log-probs are products of float32 copies of bfloat16, which TF32 multiplies exactly, several times as fast.
        torch.set_float32_matmul_precision("high")


def shared_policy(policy: Policy, orders: Orders, ranks: Ranks) -> Policy:
    """Rank 0's whole policy as the one that is trained; `policy` itself may be let go then."""
    config = orders.config
    if not needs_group(config):
        policy.model.to(device_of_rank())
        if config.parallel.activation_checkpointing:
            checkpoint_activations(policy)
        return policy
    shape = replace(_shape(orders), tokenizer=policy.tokenizer)
    return sharded(shape, ranks, config.parallel, device_of_rank(), policy.tensors())


def orders_of(config: RunConfig, policy: Policy, token: int, run: str) -> Orders:
    """Raises ConfigError for a policy that several ranks cannot train."""
    if needs_group(config):
        use_packing(policy)
        check_shardable(policy)
    return Orders(config, token, dict(policy.files), packs(policy), run)


def _shape(orders: Orders) -> Policy:
    shape = empty_policy(orders.files, packs=orders.packs)
    if orders.config.parallel.activation_checkpointing:
        checkpoint_activations(shape)
    return shape


def follow() -> int:
    """A rank that is not the first, from start to exit; returns the exit code (sapo_learner.errors)."""
    device = device_of_rank()
    _asked_to_stop(signal.SIG_DFL)  # nobody may ever join
    try:
        with joined(device) as ranks, together(ranks):
            _asked_to_stop(signal.SIG_IGN)  # rank 0 is, too, and says when it is time
            _follow(ranks, device)
    except (SapoError, OSError, MemoryError) as error:
        return say_why(error, aloud=SAID not in getattr(error, "__notes__", ()))
    finally:
        sys.stderr.flush()
    return 0


def _asked_to_stop(answer: signal.Handlers) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, answer)


def _follow(ranks: Ranks, device: torch.device) -> None:
    orders: Orders = ranks.awaited(_nothing)
    config = orders.config
    of_run(orders.run)
    prepare(config)
    policy = sharded(_shape(orders), ranks, config.parallel, device, None)
    session = TrainingSession(config, policy, None, orders.token, ranks)
    session.restore()
    session.snapshot()
    session.run(lambda _: None, lambda _: None)


def _nothing() -> Orders:
    raise AssertionError("only rank 0 is asked")
