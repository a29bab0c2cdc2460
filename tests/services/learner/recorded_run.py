"""A run's directory with a whole recorded log, for learners to work on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sapo_learner import checkpoint, skips
from sapo_learner.archive import Archive
from sapo_learner.policy import Policy, tiny_policy, write_policy
from sapo_learner.snapshot import weights_digest
from services.learner.session import TrainingSession
from services.runtime.settings import RunConfig, save_config
from services.wire import encode
from tests.recorded import ALPHABET, degenerate_group, entries, random_group
from tests.small_run import run_config

GROUPS = 3


class Run:
    """A run's directory with a whole log, and one learner after the other that works on it."""

    def __init__(self, directory: Path, *, steps: int = 12, token: int = 0) -> None:
        """token: of the last learner before; the directory is made when there is none."""
        self.directory, self.token = directory, token
        self.config: RunConfig = run_config(
            directory,
            optimizer={"learning_rate": 1e-3, "warmup_steps": 2},
            training={"steps": steps, "groups_per_step": GROUPS, "max_policy_age": 100, "microbatch_tokens": 64},
            checkpoint={"every": 2, "keep": 3},
        )
        if not directory.exists():
            self._make(steps * GROUPS)

    def _make(self, count: int) -> None:
        save_config(self.config)
        write_policy(tiny_policy(ALPHABET, seed=0), self.directory / "model")
        made = [degenerate_group(n) if n % 7 == 3 else random_group(n) for n in range(count)]
        with Archive(self.directory / "archive", 0) as archive:
            archive.append(entries([encode(each) for each in made]))

    @contextmanager
    def session(self, step: int | None = None) -> Iterator[TrainingSession]:
        self.token += 1
        archive_directory = self.directory / "archive"
        with skips.learning(archive_directory), Archive(archive_directory, self.token) as archive:
            session = TrainingSession(self.config, self.base(), archive, self.token)
            session.restore(step)
            yield session

    def base(self) -> Policy:
        return tiny_policy(ALPHABET, seed=0)

    def train(self, *, until: int | None = None, step: int | None = None, save: bool = True) -> str:
        """One learner's life; without `save` it is as if it were killed at the end. Returns the digest it had."""
        with self.session(step) as session:
            if not save:
                session.save = lambda: None  # type: ignore[method-assign]

            def stop_at(news: object) -> None:
                if until is not None and session.learner.step_count >= until:
                    session.log.stop()

            session.run(lambda _: None, stop_at)
            return weights_digest(session.learner.policy.tensors())

    @property
    def kept(self) -> list[int]:
        return [found.step for found in checkpoint.list_whole(self.directory / "checkpoints")]
