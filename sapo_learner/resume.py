"""The learner's whole state as a checkpoint, and back: what makes resuming, and replaying, exact."""

from typing import Any

import torch

from sapo_learner.checkpoint import CheckpointState
from sapo_learner.config import LearnerSettings, parse
from sapo_learner.control import settings_of
from sapo_learner.learner import Learner
from sapo_learner.ledger import Ledger
from sapo_learner.policy import Policy, load_weights
from sapo_learner.train import Position


def capture(learner: Learner, position: Position) -> CheckpointState:
    """Everything at a step boundary; the tensors are the learner's own, not copies."""
    return CheckpointState(
        step=learner.step_count,
        cursor=position.cursor,
        chain=position.chain,
        ledger=position.ledger.to_dict(),
        model=learner.policy.tensors(),
        optimizer=learner.optimizer_tensors(),
        rng={"torch": torch.get_rng_state()},
        environment=environment(),
        extra={"settings": settings_of(learner.settings)},
    )


def settings_in(state: CheckpointState, *, where: str) -> LearnerSettings:
    """The settings that were in force. Raises ConfigError for a checkpoint of a version with others."""
    return parse(LearnerSettings, state.extra["settings"], where=where)


def restore(learner: Learner, state: CheckpointState, *, where: str) -> Position:
    """Bring the learner to `state`; returns its place in the log."""
    learner.change_settings(settings_in(state, where=where))
    load_weights(learner.policy, state.model)
    learner.load_optimizer_tensors(state.optimizer)
    learner.step_count = state.step
    torch.set_rng_state(state.rng["torch"])
    return Position(state.cursor, state.chain, Ledger.from_dict(state.ledger))


def revived(policy: Policy, state: CheckpointState, *, temperature: float, where: str) -> tuple[Learner, Position]:
    """A new learner at `state`. policy: of that architecture; its weights are overwritten."""
    learner = Learner(policy, settings_in(state, where=where), temperature=temperature)
    return learner, restore(learner, state, where=where)


def environment() -> dict[str, Any]:
    """What equality to the last bit depends on, beside the log."""
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "world_size": 1,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
