"""What the training thread does between two steps: checkpoint, publish, report. And where it starts from.

restore     newest whole checkpoint that the archive agrees with, or the base policy as checkpoint 0
each step   checkpoint when due, then publish when due, then the step's line for the record
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from sapo_learner import checkpoint, proximal, reference, skips
from sapo_learner.archive import Archive
from sapo_learner.config import LearnerSettings
from sapo_learner.control import last_settings
from sapo_learner.errors import Corrupt, NotFound, Unavailable
from sapo_learner.learner import Learner
from sapo_learner.ledger import Ledger
from sapo_learner.parallel import ALONE, SAID, Ranks
from sapo_learner.pins import pinned
from sapo_learner.policy import Policy
from sapo_learner.probe import draw_sequence, measure, measure_sharded
from sapo_learner.resume import capture, environment_of, restore_from
from sapo_learner.sharding import ShardedPolicy
from sapo_learner.train import Position, StepReport, train
from services.learner.attention import Attention, forget
from services.learner.publisher import Snapshot, copy_weights
from services.learner.reader import ArchiveLog
from services.learner.remarks import Remarks
from services.learner.shared_log import SharedLog
from services.learner.shown_groups import Showcase, TrainedGroup
from services.learner.step_record import Histograms, step_record
from services.runtime.logging import about
from services.runtime.settings import RunConfig
from services.wire import decode

log = logging.getLogger(__name__)
RETRY_SECONDS = 2.0  # between two tries to save on a disk that is full


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
    shown: TrainedGroup | None


class TrainingSession:
    """Lives in the training thread; `publish` and `report` hand things over to the event loop."""

    def __init__(
        self, config: RunConfig, policy: Policy, archive: Archive | None, token: int, ranks: Ranks = ALONE
    ) -> None:
        """ranks: each of which has such a session, with its share of the policy; only the first has the archive.

        Raises Corrupt, naming the entry, when one has killed the learner again and again.
        """
        self._config, self._archive, self._token, self._ranks = config, archive, token, ranks
        self._directory = config.run.directory / "checkpoints"
        self._skips = ranks.decided(lambda: skips.read(self._own_archive.directory))
        self._page = config.run.directory / "learner.attention"
        self._attention = Attention(self._page, self._skips) if ranks.first else None
        self._reference_directory = config.run.directory / reference.DIRECTORY
        self.wanted = ranks.decided(lambda: pinned(config.learner, config.run.directory))
        self.learner = Learner(
            policy, self.wanted, temperature=config.sampling.temperature, ranks=ranks,
            reference_directory=self._reference_directory,
        )  # fmt: skip
        context = config.engine.vllm.max_model_len
        self._probe_ids = ranks.decided(lambda: draw_sequence(policy, seed=config.run.seed, context=context))
        self.position = Position()
        self.log = ArchiveLog(archive)
        self.showcase = Showcase(policy.tokenizer.decode) if ranks.first else None  # others have no tokenizer
        self.progress = Progress()
        self.saved_step = -1
        self._remarks, self._histograms = Remarks(), Histograms()

    def restore(self, step: int | None = None) -> None:
        """Go to the newest usable checkpoint (of `step`, if given), or make checkpoint 0 of the base policy.

        Going back to an older one leaves a branch of the run: a checkpoint under our token makes that last. Raises
        NotFound for a step that is not kept; ConfigError, Mismatch, Corrupt or NotFound for a reference policy that is
        wanted and cannot be had any more.
        """
        loaded, went_back = self._ranks.decided(lambda: self._choose(step))
        if loaded is None:
            self._keep_reference(reference.digest_of(self.learner.policy))
            self.save()
            return
        state, path = loaded.state, loaded.found.path
        self._keep_reference(state.extra.get("began_with"))
        self.position = restore_from(self.learner, state, path)
        if self._config.reference.kl_coefficient or self.learner.settings.reference.kl_coefficient:
            self.learner.held_reference()  # now: later, what is wrong with it would be blamed on an entry
        self._note_progress()
        if self._ranks.first:
            self._say_what_is_resumed(loaded, "it was asked for" if step is not None else "the newest that is usable")
        if went_back:
            self.save()
        self.saved_step = state.step

    def _choose(self, step: int | None) -> tuple[checkpoint.Loaded | None, bool]:
        """The checkpoint to go on from, without what ranks have shares of, and whether newer ones are left behind."""
        try:
            loaded = checkpoint.load_newest(self._directory, step, belongs=self._belongs, read=checkpoint.load_facts)
        except NotFound:
            if step is not None:
                raise
            return None, False
        return loaded, step is not None and loaded.found != checkpoint.list_whole(self._directory)[0]

    def _say_what_is_resumed(self, loaded: checkpoint.Loaded, why: str) -> None:
        state, ours = loaded.state, environment_of(self.learner)
        if loaded.reason:
            log.warning("newer checkpoints cannot be used: %s", loaded.reason)
        log.info("resumed %s (%s), at step %d and entry %d", loaded.found.path.name, why, state.step, state.cursor)
        if state.environment != ours:
            log.warning("this learner differs from the one that saved it, so weights may differ in their last bits: "
                        "%s, now %s", state.environment, ours)  # fmt: skip

    @property
    def _own_archive(self) -> Archive:
        assert self._archive is not None, "only rank 0 has one"
        return self._archive

    def _keep_reference(self, began_with: str | None) -> None:
        """Keep the policy that the run began with, if it is wanted; called while the learner still holds it."""
        self.learner.began_with = began_with
        if self._config.reference.kl_coefficient:
            reference.keep(self._reference_directory, self.learner.policy, began_with)

    def _note_progress(self) -> Progress:
        self.progress = Progress(self.learner.step_count, self.position.cursor, self.position.ledger)
        return self.progress

    def _belongs(self, cursor: int, chain: str) -> bool:
        return self._own_archive.chain_at(cursor) == chain

    def settings_ahead(self) -> LearnerSettings:
        """The settings that will be in force once everything archived is consumed."""
        return last_settings(self._own_archive.entries(self.position.cursor), self.learner.settings)

    def snapshot(self) -> Snapshot:
        """The weights as they are now, as they are published, with the numbers that engines must come to (I4).

        On ranks other than the first without tensors. Raises Corrupt for weights that give no finite log-probs.
        """
        policy = self.learner.policy
        if isinstance(policy, ShardedPolicy):
            probe = measure_sharded(policy, self._config.policy.dtype, self._probe_ids)
            return replace(copy_weights(policy, self.learner.step_count, self._config.policy.dtype), probe=probe)
        copied = copy_weights(policy, self.learner.step_count, self._config.policy.dtype)
        return replace(copied, probe=measure(policy, copied.tensors, self._probe_ids))

    def save(self) -> None:
        """Checkpoint the state as it is now, unless it is saved already. Raises Unavailable; see `_write`."""
        if self.saved_step == self.learner.step_count:
            return
        state = capture(self.learner, self.position)
        try:
            self._write(state)
        finally:
            self.log.waiting_for = ""
        self.saved_step = state.step

    def _write(self, state: checkpoint.CheckpointState) -> None:
        """Save; while the disk takes nothing, training waits here. Raises Unavailable when it shall stop meanwhile."""
        name, said, ranks = f"checkpoint of step {state.step}", False, self._ranks
        while True:
            try:
                saved = checkpoint.save(self._directory, state, token=self._token, ranks=ranks)
                ranks.decided(partial(self._prune, saved))
            except OSError as error:
                if not said and ranks.first:
                    log.error("%s: %s; training waits until there is room in %s", name, error, self._directory)
                said = True
                self.log.waiting_for = f"room on the disk for the {name}"
                if ranks.decided(partial(self.log.pause, RETRY_SECONDS)):
                    refusal = self._not_saved(name, error)
                    if not ranks.first:
                        refusal.add_note(SAID)
                    raise refusal from None
            else:
                if said and ranks.first:
                    log.info("%s is saved; training goes on", name)
                return

    def _prune(self, saved: Path) -> None:
        """Delete checkpoints that are not kept and, if only they are wanted, the archive before the oldest kept one."""
        everything = self._config.archive.keep == "all"
        checkpoint.prune(self._directory, self._config.checkpoint.keep, saved=saved, base=everything)
        if everything:
            return
        try:
            freed = self._own_archive.prune(checkpoint.oldest_cursor(self._directory))
        except (OSError, Corrupt) as error:
            log.warning("the archive was not pruned: %s", error)
        else:
            if freed:
                log.info("archive: %.1f MB pruned", freed / 1e6)

    def _not_saved(self, name: str, error: OSError) -> Unavailable:
        newest = f"from that of step {self.saved_step}" if self.saved_step >= 0 else "from the beginning"
        fix = f"make room, then start again: the run goes on {newest}, and everything accepted since is in the log"
        return Unavailable(f"the {name} could not be saved: {error}", where=str(self._directory), fix=fix)

    def run(self, publish: Callable[[Snapshot], None], report: Callable[[StepNews], None]) -> None:
        """Train until the last step or until the log is stopped; then checkpoint. Only rank 0 publishes and reports."""
        try:
            self._train(publish, report)
        except Unavailable:  # memory or disk were too small: no entry is to blame
            self._done()
            if not self._ranks.first:  # whose page it is only sees that this rank is gone
                forget(self._page)
            raise
        self._done()
        self.save()

    def _done(self) -> None:
        if self._attention:
            self._attention.done()

    def _train(self, publish: Callable[[Snapshot], None], report: Callable[[StepNews], None]) -> None:
        config, first = self._config, self._ranks.first
        if first and (inert := proximal.remark(self.learner.settings)):
            log.warning(inert)
        started, waited = time.time(), 0.0
        shared = SharedLog(self.log, self._ranks) if self._ranks.size > 1 else self.log
        attend, phases = self._attention or (lambda *_: None), self.learner.phases
        for step in train(self.learner, shared, self.position, decode=decode, skips=self._skips, attend=attend):
            self._done()
            ended, number = time.time(), step.update.step
            last = self.learner.settings.training.steps
            if first:
                with about(step=number):
                    self._remarks.of(step, self.learner.settings)
            if number % config.checkpoint.every == 0 or number == last:
                with phases("checkpoint"):
                    self.save()
            if number % config.pacing.publish_every == 0 or number == last:
                with phases("snapshot"):
                    snapshot = self.snapshot()
                if first:
                    publish(snapshot)
            after = phases.taken()
            if first:
                waiting = self.log.waited_seconds - waited
                line = step_record(step, started + waiting, ended, waiting, after)
                line |= self._histograms.of(self.learner.figures)
                shown = self.showcase.chosen(step, self.learner) if self.showcase else None
                report(StepNews(line, step, self._note_progress(), shown))
                started, waited = time.time(), self.log.waited_seconds
