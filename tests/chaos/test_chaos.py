"""Twenty faults in one run of the stack, and then: nothing lost, nothing twice, the same weights.

`make chaos` is the long form.
"""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.chaos.campaign import Outcome, campaign, short_plan
from tests.chaos.faults import FAULTS, FORGETTING
from tests.chaos.harness import ChaosFailure

SEED = int(os.environ.get("CHAOS_SEED", "7"))
REPEAT = f"this repeats it: make chaos MODE=short SEED={SEED}"
pytestmark = [pytest.mark.stack, pytest.mark.chaos, pytest.mark.timeout(400)]


@pytest.fixture(scope="session")
def outcome(tmp_path_factory: pytest.TempPathFactory, warm_starts: Path) -> Outcome:
    print(REPEAT)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SAPO_CACHE_DIR", str(warm_starts))
        environment.delenv("SAPO_REDIS_URL", raising=False)
        try:
            return asyncio.run(
                campaign(
                    tmp_path_factory.mktemp("chaos"), short_plan(SEED), seed=SEED,
                    say=lambda line: print(line, file=sys.stderr, flush=True),
                )
            )  # fmt: skip
        except ChaosFailure as failure:
            pytest.fail(f"{failure}\n{REPEAT}", pytrace=False)


def test_the_plan_holds_every_kind_of_fault() -> None:
    kinds = {strike.fault for strike in short_plan(SEED)}
    assert len(short_plan(SEED)) == 20
    assert {kind for kind in FAULTS if not kind.endswith("silent")} - kinds == {"second learner"}
    assert short_plan(SEED) == short_plan(SEED)


def test_I2_nothing_is_lost_and_nothing_comes_twice_whatever_is_done(outcome: Outcome) -> None:
    """Ledger, draws, acknowledged groups, order of training, and the weights of a replay: `verdict.py` has each."""
    assert not outcome.problems, "\n".join([*outcome.problems, REPEAT])
    assert outcome.verdict.accepted > 0


def test_the_run_recovers_from_each_fault_without_a_hand(outcome: Outcome) -> None:
    assert [each.fault for each in outcome.struck] == [strike.fault for strike in short_plan(SEED)]
    assert all(each.restarts for each in outcome.struck if each.fault.startswith(("kill", "second"))), REPEAT


def test_what_an_emptied_or_older_redis_forgets_is_sampled_anew(outcome: Outcome) -> None:
    forgotten = sum(lost for each, lost in zip(outcome.struck, outcome.lost, strict=True) if each.fault in FORGETTING)
    assert len(outcome.verdict.lost) == forgotten, REPEAT
    assert not outcome.verdict.skipped, REPEAT
