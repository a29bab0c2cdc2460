"""What the training thread does between two steps: checkpoint, publish, report. And where it starts from.

restore     newest whole checkpoint that the archive agrees with, or the base policy as checkpoint 0
each step   checkpoint when due, then publish when due, then the step's line for the record
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sapo_learner import checkpoint
from sapo_learner.archive import GENESIS, Archive
from sapo_learner.config import LearnerSettings, parse
from sapo_learner.control import last_settings, settings_of
from sapo_learner.errors import NotFound
from sapo_learner.learner import Learner
from sapo_learner.ledger import Ledger
from sapo_learner.policy import Policy, load_weights
from sapo_learner.train import Position, StepReport, train
from services.learner.publisher import Snapshot, copy_weights
from services.learner.reader import ArchiveLog
from services.runtime.settings import RunConfig
from services.wire import decode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where training stands at a step boundary: replaced as a whole, so that other threads may read it."""

    step: int = 0
    cursor: int = 0
    ledger: Ledger = field(default_factory=Ledger)


@dataclass(frozen=True)
class StepNews:
    """A finished step on its way to the event loop."""

    record: dict[str, Any]
    report: StepReport
    progress: Progress


class TrainingSession:
    """Lives in the training thread; `publish` and `report` hand things over to the event loop."""

    def __init__(self, config: RunConfig, policy: Policy, archive: Archive, token: int) -> None:
        self._config, self._archive, self._token = config, archive, token
        self._directory = config.run.directory / "checkpoints"
        self.learner = Learner(policy, config.learner, temperature=config.sampling.temperature)
        self.position = Position()
        self.log = ArchiveLog(archive)
        self.progress = Progress()
        self.saved_step = -1

    def restore(self) -> None:
        """Go to the newest usable checkpoint, or make checkpoint 0 of the base policy."""
        try:
            loaded = checkpoint.load_newest(self._directory, belongs=self._belongs)
        except NotFound:
            self.save()
            return
        state = loaded.state
        self.learner.change_settings(parse(LearnerSettings, state.extra["settings"], where=str(loaded.found.path)))
        load_weights(self.learner.policy, state.model)
        self.learner.load_optimizer_tensors(state.optimizer)
        self.learner.step_count = state.step
        self.position = Position(state.cursor, state.chain, Ledger.from_dict(state.ledger))
        torch.set_rng_state(state.rng["torch"])
        self.saved_step = state.step
        self._note_progress()
        log.info("resumed %s, at entry %d%s", loaded.found.path.name, state.cursor,
                 f"; passed over: {loaded.reason}" if loaded.reason else "")  # fmt: skip
        environment = _environment()
        if state.environment != environment:
            log.warning("this process differs from the one that saved it, so weights may differ in their last bits: "
                        "%s, now %s", state.environment, environment)  # fmt: skip

    def _note_progress(self) -> Progress:
        self.progress = Progress(self.learner.step_count, self.position.cursor, self.position.ledger)
        return self.progress

    def _belongs(self, cursor: int, chain: str) -> bool:
        if cursor == 0:
            return chain == GENESIS
        entries = self._archive.read(cursor - 1, 1)
        return bool(entries) and entries[0].chain == chain

    def settings_ahead(self) -> LearnerSettings:
        """The settings that will be in force once everything archived is consumed."""
        return last_settings(self._archive.entries(self.position.cursor), self.learner.settings)

    def save(self) -> None:
        """Checkpoint the state as it is now, unless it is saved already."""
        if self.saved_step == self.learner.step_count:
            return
        state = checkpoint.CheckpointState(
            step=self.learner.step_count,
            cursor=self.position.cursor,
            chain=self.position.chain,
            ledger=self.position.ledger.to_dict(),
            model=self.learner.policy.tensors(),
            optimizer=self.learner.optimizer_tensors(),
            rng={"torch": torch.get_rng_state()},
            environment=_environment(),
            extra={"settings": settings_of(self.learner.settings)},
        )
        saved = checkpoint.save(self._directory, state, token=self._token)
        checkpoint.prune(self._directory, self._config.checkpoint.keep, saved=saved)
        self.saved_step = self.learner.step_count

    def run(self, publish: Callable[[Snapshot], None], report: Callable[[StepNews], None]) -> None:
        """Train until the last step or until the log is stopped; then checkpoint."""
        config = self._config
        started, waited = time.time(), 0.0
        for step in train(self.learner, self.log, self.position, decode=decode):
            ended, number = time.time(), step.update.step
            last = self.learner.settings.training.steps
            for entry, reason in step.invalid.items():
                log.error("entry %s is invalid: %s", entry, reason)
            if step.update.refusal:
                log.error("step %d refused: %s", number, step.update.refusal)
            if number % config.checkpoint.every == 0 or number == last:
                self.save()
            if number % config.pacing.publish_every == 0 or number == last:
                publish(copy_weights(self.learner.policy, number))
            waiting = self.log.waited_seconds - waited
            report(StepNews(step_record(step, started + waiting, ended, waiting), step, self._note_progress()))
            started, waited = time.time(), self.log.waited_seconds
        self.save()


def step_record(step: StepReport, started: float, ended: float, waited: float) -> dict[str, Any]:
    """The step's line in the run's record; times are Unix seconds, from the step's first entry to its update."""
    update = step.update
    responses = [response for group in step.groups for response in group.trajectories]
    names = sorted({name for response in responses for name in response.rewards})
    return {
        "kind": "step",
        "step": update.step,
        "started": started,
        "ended": ended,
        "waited_seconds": waited,
        "outcomes": dict(step.outcomes),
        "cursor": step.cursor,
        "reward": step.reward,
        "rewards": {name: _mean([each.rewards[name] for each in responses if name in each.rewards]) for name in names},
        "response_tokens": float(np.mean([len(response.token_ids) for response in responses])) if responses else 0.0,
        "stopped": float(np.mean([response.finish_reason == "stop" for response in responses])) if responses else 0.0,
        "mixed_version_responses": sum(len(response.spans) > 1 for response in responses),
        "applied": update.applied,
        "refusal": update.refusal,
        "learning_rate": update.learning_rate,
        "loss": update.loss,
        "gradient_norm": update.gradient_norm,
        "tokens": update.tokens,
        "sequences": update.sequences,
        "entropy": update.entropy,
        "log_ratio_std": update.log_ratio_std,
        "clamped_fraction": update.clamped_fraction,
        "policy_age_mean": update.policy_age_mean,
        "policy_age_max": update.policy_age_max,
        "diagnostics": {name: dict(values) for name, values in update.diagnostics.items()},
        "seconds": dict(update.seconds),
    }


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def _environment() -> dict[str, Any]:
    """What bit-exact continuation depends on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "world_size": 1,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
