"""The learner's whole state as a checkpoint, and back: what makes resuming, and replaying, exact."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapo_learner import checkpoint, shards
from sapo_learner.checkpoint import CheckpointState
from sapo_learner.config import LearnerSettings
from sapo_learner.control import parse_settings, settings_of
from sapo_learner.errors import Mismatch
from sapo_learner.learner import Learner
from sapo_learner.ledger import Ledger
from sapo_learner.policy import Policy, load_weights, require_same_shapes
from sapo_learner.sharding import ShardedPolicy, distribute
from sapo_learner.snapshot import without_data
from sapo_learner.train import Position


def capture(learner: Learner, position: Position) -> CheckpointState:
    """Everything at a step boundary; the tensors are the learner's own, not copies."""
    return CheckpointState(
        step=learner.step_count,
        cursor=position.cursor,
        chain=position.chain,
        ledger=position.ledger.to_dict(),
        model=learner.policy.state(),
        optimizer=learner.optimizer_tensors(),
        rng={"torch": torch.get_rng_state()},
        environment=environment_of(learner),
        extra={"settings": settings_of(learner.settings), "began_with": learner.began_with} | _base(learner.policy),
    )


def settings_in(state: CheckpointState, *, where: str) -> LearnerSettings:
    """The settings that were in force. Raises ConfigError for a checkpoint of a version with others."""
    return parse_settings(state.extra["settings"], where=where)


def restore(learner: Learner, state: CheckpointState, *, where: str) -> Position:
    """Bring the learner to `state`; returns its place in the log.

    Raises Mismatch for adapters that were trained beside other weights than the learner's.
    """
    load_state(learner.policy, state, where=where)
    learner.load_optimizer_tensors(state.optimizer)
    return _restore_rest(learner, state, where=where)


def restore_from(learner: Learner, state: CheckpointState, path: Path) -> Position:
    """The same on all ranks, each of which reads its share. state: as `checkpoint.load_facts` gives it. path: where the
    tensors lie, of however many ranks. Raises Mismatch for tensors of another model."""
    if not isinstance(learner.policy, ShardedPolicy):
        return restore(learner, checkpoint.with_tensors(state, path), where=str(path))
    ranks, model = learner.ranks, learner.policy.state()
    if checkpoint.is_sharded(path):
        found = ranks.decided(lambda: shards.shapes(path))
        own = _own_share(learner, model, found)
        shards.fill(own, path)
    else:
        whole = checkpoint.load_whole(path) if ranks.first else None
        found = ranks.agreed({name: each.shape for name, each in without_data(whole or {}).items()})
        distribute(_own_share(learner, model, found), whole, ranks)
    return _restore_rest(learner, state, where=str(path))


def _own_share(learner: Learner, model: Mapping[str, Tensor], found: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """This rank's tensors, named as in a checkpoint, with room for the optimizer's."""
    parts = {kind: {} for kind in ("model", "optimizer")}  # type: dict[str, dict[str, torch.Size]]
    for name, shape in found.items():
        kind, _, own = name.partition("/")
        parts[kind][own] = shape
    require_same_shapes(model, parts["model"])
    optimizer = learner.empty_optimizer_tensors(parts["optimizer"])
    return {f"model/{name}": each for name, each in model.items()} | {
        f"optimizer/{name}": each for name, each in optimizer.items()
    }


def _restore_rest(learner: Learner, state: CheckpointState, *, where: str) -> Position:
    learner.change_settings(settings_in(state, where=where))
    learner.step_count = state.step
    learner.began_with = state.extra.get("began_with")
    torch.set_rng_state(state.rng["torch"])
    return Position(state.cursor, state.chain, Ledger.from_dict(state.ledger))


def load_state(policy: Policy, state: CheckpointState, *, where: str) -> None:
    """Copy a checkpoint's weights, or adapters, into a policy. Raises Mismatch for one that they do not belong to."""
    _require_same_base(policy, state, where)
    load_weights(policy, state.model)


def revived(
    policy: Policy, state: CheckpointState, *, temperature: float, where: str, reference_directory: Path | None = None
) -> tuple[Learner, Position]:
    """A new learner at `state`. policy: of that architecture; its weights are overwritten."""
    settings = settings_in(state, where=where)
    learner = Learner(policy, settings, temperature=temperature, reference_directory=reference_directory)
    return learner, restore(learner, state, where=where)


def _base(policy: Policy) -> dict[str, Any]:
    """Adapters mean nothing without the weights they were trained beside, which stay where they are: named here."""
    return {"base": asdict(policy.frozen_base)} if policy.frozen_base else {}


def _require_same_base(policy: Policy, state: CheckpointState, where: str) -> None:
    ours, theirs = policy.frozen_base, state.extra.get("base")
    if bool(ours) != bool(theirs):
        what, fix = (
            ("adapters", "set policy.lora as in that run") if theirs else ("all weights", "leave policy.lora out")
        )
        raise Mismatch(
            f"this checkpoint holds {what}, and the learner's policy does not fit that", where=where, fix=fix
        )
    if ours and theirs and ours.digest != theirs["digest"]:
        raise Mismatch(
            f"its adapters were trained beside the weights {theirs['digest'][:12]} of {theirs['source']}, "
            f"but the policy's base is {ours.digest[:12]} of {ours.source}",
            where=where, fix="bring back the base model as it was",
        )  # fmt: skip


def environment_of(learner: Learner) -> dict[str, Any]:
    """What equality to the last bit depends on, beside the log."""
    policy = learner.policy
    precision = policy.settings.precision if isinstance(policy, ShardedPolicy) else "float32"
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "world_size": learner.ranks.size,
        "precision": precision,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
