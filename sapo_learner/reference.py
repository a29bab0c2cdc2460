"""KL to a frozen reference policy, the one that the run began with, as a term of every token's loss.

    d_t = log pi_ref(y_t) - log pi_theta(y_t)
    loss_t + kl_coefficient (exp(d_t) - 1 - d_t)            gradient:  kl_coefficient (1 - exp(d_t)) grad log pi_theta

That is the k3 estimate (J. Schulman, "Approximating KL divergence"), never negative, with the gradient through it as in
GRPO (arXiv 2402.03300, Eq. 4). Its value estimates KL(pi_theta || pi_ref) on tokens of pi_theta; its gradient is not
that KL's: on such tokens it is that of KL(pi_ref || pi_theta), and on stale ones of neither (Tang and Munos, arXiv
2506.09477, on differentiating KL estimates). d is cut off at +-20 and has no gradient beyond.

The weights (with LoRA: the adapters) lie in the run's directory, written once, before training moves them; every
checkpoint names their digest.
"""

import copy
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from sapo_learner.disk import naming
from sapo_learner.empty_policy import empty_like
from sapo_learner.errors import ConfigError, Corrupt, Mismatch, NotFound
from sapo_learner.objectives import LOG_RATIO_LIMIT, Tokens
from sapo_learner.parallel import ALONE
from sapo_learner.policy import Policy, load_weights
from sapo_learner.segment import fsync
from sapo_learner.sharding import ShardedPolicy, gathered, sharded, whole
from sapo_learner.snapshot import LazyTensors, save_tensors, tensors_in, weights_digest

DIRECTORY = "reference"
"""Of a run's directory."""
_FILE = "model.safetensors"


def k3(tokens: Tokens, reference_logprobs: Tensor) -> Tensor:
    """[T] the estimate, in `tokens.dtype`, 0 at masked slots; carries the gradient. reference_logprobs: [T]."""
    difference = reference_logprobs.detach().to(tokens.dtype) - tokens.logprobs.to(tokens.dtype)
    d = torch.where(tokens.loss_mask, difference, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(d) - d


def digest_of(policy: Policy) -> str:
    """Of what training will change: what is written here, and named by every checkpoint. Called on all ranks."""
    return weights_digest(LazyTensors(policy.state(), lambda _, each: whole(each)))


def keep(directory: Path, policy: Policy, digest: str | None) -> None:
    """Write `policy` as the run's reference, durably, unless it is there already; called on all ranks.

    digest: `digest_of` the policy that the run began with; None where it is not known. Raises ConfigError when `policy`
    is another.
    """
    ranks = policy.ranks if isinstance(policy, ShardedPolicy) else ALONE
    path = directory / _FILE
    if ranks.decided(path.exists):
        return
    if digest is not None and digest_of(policy) != digest:
        raise ConfigError(
            "the run began with another policy than the one that policy.source gives now, so there is no reference",
            where="reference.kl_coefficient", fix="restore policy.source, or set the coefficient to 0",
        )  # fmt: skip
    tensors = gathered(policy.state(), keep=ranks.first) if isinstance(policy, ShardedPolicy) else policy.state()
    if ranks.first:
        _write(tensors, path)


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{_FILE}")
    with naming(path):
        save_tensors(tensors, temporary)
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)


def load(directory: Path | None, policy: Policy, digest: str | None) -> Policy:
    """A frozen policy like `policy` with the reference's weights, on its device and in its dtype; called on all ranks.

    digest: that the weights must have; None where it is not known. Raises NotFound, Corrupt or Mismatch.
    """
    if isinstance(policy, ShardedPolicy):
        return _load_sharded(directory, policy, digest)
    tensors = _read(directory, digest)
    # What training leaves alone anyway, such as the weights beside adapters, is shared.
    shared = [policy.tokenizer, *(each for each in policy.model.parameters() if not each.requires_grad)]
    frozen = copy.deepcopy(policy, {id(each): each for each in shared})
    load_weights(frozen, tensors)
    frozen.model.requires_grad_(False)
    return frozen


def _load_sharded(directory: Path | None, policy: ShardedPolicy, digest: str | None) -> Policy:
    tensors = None

    def read() -> None:
        nonlocal tensors
        tensors = _read(directory, digest)

    policy.ranks.decided(read)  # rank 0 has read it, or all raise what it raised
    frozen = sharded(empty_like(policy), policy.ranks, policy.settings, policy.device, tensors)
    frozen.model.requires_grad_(False)
    return frozen


def _read(directory: Path | None, digest: str | None) -> Mapping[str, Tensor]:
    if directory is None or not (directory / _FILE).is_file():
        raise NotFound(
            "the reference policy is not there", where=str(directory or "reference.kl_coefficient"),
            fix="restore it from a copy of the run, or set reference.kl_coefficient to 0",
        )  # fmt: skip
    path = directory / _FILE
    try:
        tensors = tensors_in(path)
    except safetensors.SafetensorError as error:
        raise Corrupt(f"not a safetensors file: {error}", where=str(path), fix="restore it from a copy") from None
    found = weights_digest(tensors)
    if digest is not None and found != digest:
        raise Mismatch(
            f"holds weights {found[:12]}, but the run began with {digest[:12]}", where=str(path),
            fix="restore it from a copy of the run",
        )  # fmt: skip
    return tensors
