"""Every process on its own: any start order, a worker that joins, a worker that leaves, and the same result."""

import re
from collections import Counter
from pathlib import Path

import pytest

from sapo_learner.archive import Archive
from sapo_learner.control import GROUP
from services.wire import decode
from tests.end_to_end.conftest import GROUPS_PER_STEP
from tests.end_to_end.terminals import STEPS, Terminals, opened, run, waits_said

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def terminals(tmp_path_factory: pytest.TempPathFactory, warm_starts: Path) -> Terminals:
    with opened(tmp_path_factory.mktemp("terminals"), warm_starts) as started:
        run(started)
    return started


def test_each_service_says_for_what_it_waits(terminals: Terminals) -> None:
    control_plane = terminals.addresses["control-plane"]
    for name in ("rollout-0", "rollout-1", "ingest", "learner"):
        (reason,) = terminals.waited_for[name]
        assert control_plane in reason
    (reason,) = terminals.waited_for["control-plane"]
    assert f"127.0.0.1:{terminals.redis.port}" in reason
    assert "hush" not in reason


def test_it_is_said_once_and_not_per_retry(terminals: Terminals) -> None:
    for name in ("rollout-0", "ingest", "learner"):
        said = waits_said(terminals.open[name], "the control plane")
        assert 1 <= len(said) <= 3, said
        assert len(said) == len(set(said)), said
    assert len(waits_said(terminals.open["control-plane"], "Redis")) == 1


def test_the_run_comes_to_the_same_end_as_under_sapo_up(terminals: Terminals) -> None:
    assert terminals.status["state"] == "finished"
    assert terminals.status["learner"]["step"] == STEPS
    first, last = terminals.status["evaluations"][0], terminals.status["evaluations"][-1]
    assert (first["step"], last["step"]) == (0, STEPS)
    assert last["pass_at_1"] > first["pass_at_1"] + 0.1


def test_a_third_worker_fetches_the_policy_and_contributes(terminals: Terminals) -> None:
    groups = Counter(
        decode(entry.payload).worker
        for entry in Archive(terminals.directory / "archive", None).entries()
        if entry.kind == GROUP
    )
    assert set(groups) == {"rollout-0", "rollout-1", "rollout-2"}
    assert groups["rollout-2"] > 0


def test_a_worker_that_is_sent_sigterm_leaves_nothing_behind(terminals: Terminals) -> None:
    assert terminals.exit_codes["rollout-0"] == 0
    assert terminals.leases_after_leaving == []
    assert 0 < terminals.left_at < STEPS
    assert terminals.ledger["open"] == 0, "what it had leased was sampled by it or by others"


def test_no_service_dies_of_a_peer_that_hangs_up(terminals: Terminals) -> None:
    assert terminals.dies_of_sigpipe == []


def test_torchrun_starts_all_ranks_again_when_one_is_killed(terminals: Terminals) -> None:
    said = terminals.open["learner"].said
    assert 0 < terminals.killed_at < STEPS
    assert len(re.findall(r"resumed step-0*[1-9]", said)) == 1
    assert "Traceback" not in said


def test_every_process_ends_with_0(terminals: Terminals) -> None:
    assert terminals.exit_codes == dict.fromkeys(
        ("rollout-0", "rollout-1", "rollout-2", "learner", "ingest", "control-plane"), 0
    )


def test_the_ledger_balances(terminals: Terminals) -> None:
    assert terminals.ledger["balanced"], terminals.ledger
    assert terminals.ledger["accepted"] == STEPS * GROUPS_PER_STEP
