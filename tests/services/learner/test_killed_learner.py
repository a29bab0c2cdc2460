"""I3 and I2 by force: a learner that is really killed, at random moments, within steps and within checkpoints."""

import multiprocessing
import time
from pathlib import Path
from random import Random

import pytest

from sapo_learner import checkpoint
from sapo_learner.snapshot import weights_digest
from tests.services.learner.recorded_run import GROUPS, Run

pytestmark = [pytest.mark.usefixtures("deterministic"), pytest.mark.timeout(180)]
STEPS, KILLS = 60, 20


def _learn(directory: Path, token: int) -> None:
    """One learner's life, in a process of its own."""
    Run(directory, steps=STEPS, token=token).train()


def test_I3_killed_at_20_random_points_of_60_steps_it_ends_with_the_digest_of_one_that_was_not(tmp_path: Path) -> None:
    run, undisturbed = Run(tmp_path / "run", steps=STEPS), Run(tmp_path / "undisturbed", steps=STEPS)
    expected = undisturbed.train()
    context, random = multiprocessing.get_context("fork"), Random(11)
    for token, step in enumerate(sorted(random.sample(range(STEPS - 4), KILLS)), start=1):
        learner = context.Process(target=_learn, args=(run.directory, token))
        learner.start()
        while max(run.kept, default=0) < step and learner.is_alive():
            time.sleep(0.002)
        learner.join(random.uniform(0, 0.05))
        assert learner.exitcode is None, "it ended by itself"
        learner.kill()
        learner.join()
    last = context.Process(target=_learn, args=(run.directory, KILLS + 1))
    last.start()
    last.join(120)
    assert last.exitcode == 0
    final = checkpoint.load_newest(run.directory / "checkpoints").state
    assert (final.step, final.cursor) == (STEPS, STEPS * GROUPS)
    assert weights_digest(final.model) == expected
