"""What of a run wants a person: each alert fires on its condition, and on nothing else."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sapo_learner import probe
from services.control_plane.dashboard import alerts
from services.control_plane.dashboard.alerts import Facts, find
from tests.services.control_plane.test_dashboard_history import line
from tests.small_run import Learner, Running

NOW = 10_000.0


def worker(**fields: Any) -> dict[str, Any]:
    return {"worker": "rollout-0", "behind": 0, "probe": {"max": 1e-6, "mean": 1e-7}, **fields}


def service(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "ok": True, "state": "fine", "waiting_for": "", **fields}


def view(**fields: Any) -> dict[str, Any]:
    return {
        "state": "training", "step": 20, "accepted": 9, "unread": 0, "workers": [worker()],
        "ledger": {"balanced": True, "problems": []}, "services": [service("learner"), service("Redis")], **fields,
    }  # fmt: skip


def step(number: int, **fields: Any) -> dict[str, Any]:
    """One a second, the last just now."""
    ended = NOW - 20 + number
    diagnostics = {"effective_sample_size": {"all": 0.9}, "log_ratio": {"all": 0.001}}
    times = {"started": ended - 0.6, "ended": ended, "waited_seconds": 0.3, "diagnostics": diagnostics}
    return line(number, **(times | fields))


STEPS = [step(number) for number in range(1, 21)]
HEALTHY = Facts(
    dtype="float32", max_policy_age=4, checkpoint_every=10, max_entries=100, max_bytes=1000, unread_bytes=10,
    steps=STEPS, evaluations=[{"step": 0, "pass_at_1": 0.3}, {"step": 20, "pass_at_1": 0.4}], saved_step=10, now=NOW,
)  # fmt: skip


def diagnosed(name: str, value: float) -> Facts:
    return replace(HEALTHY, steps=[step(number, diagnostics={name: {"all": value}}) for number in range(1, 21)])


OFF = {"log_ratio": {"all": -3.0}, "effective_sample_size": {"all": 0.01}}


def evaluated(*rates: float) -> Facts:
    lines = [{"step": place, "pass_at_1": rate, "standard_error": 0.01} for place, rate in enumerate(rates)]
    return replace(HEALTHY, evaluations=lines)


CASES: dict[str, list[tuple[dict[str, Any], Facts]]] = {
    "SapoLedgerUnbalanced": [(view(ledger={"balanced": False, "problems": ["9 are not 8"]}), HEALTHY)],
    "SapoNoWorkers": [(view(workers=[]), HEALTHY)],
    "SapoWorkersStale": [(view(workers=[worker(), worker(behind=5)]), HEALTHY)],
    "SapoLearnerSilent": [(view(services=[service("learner", ok=False, state="silent for 12 s")]), HEALTHY)],
    "SapoRedisUnreachable": [(view(services=[service("Redis", ok=False, waiting_for="no answer")]), HEALTHY)],
    "SapoLearnerStarved": [
        (view(), replace(HEALTHY, steps=[step(number, waited_seconds=20.0) for number in range(1, 21)]))
    ],
    "SapoProbeMismatch": [
        (view(workers=[worker(probe={"max": 0.1, "mean": 1e-7})]), HEALTHY),
        (view(workers=[worker(probe={"max": 0.1, "mean": 0.06})]), replace(HEALTHY, dtype="bfloat16")),
        (view(), replace(HEALTHY, probe={"max_abs_diff": 0.5})),
    ],
    "SapoUpdateRefused": [(view(), replace(HEALTHY, steps=[*STEPS[:-1], step(20, refusal="gradient is nan")]))],
    "SapoLogNearlyFull": [
        (view(unread=81), HEALTHY), (view(), replace(HEALTHY, unread_bytes=900)),
    ],
    "SapoCheckpointTooOld": [(view(step=41), replace(HEALTHY, saved_step=20))],
    "SapoPassAt1Collapse": [(view(), evaluated(0.3, 0.6, 0.2))],
    "SapoEffectiveSampleSizeCollapse": [(view(), diagnosed("effective_sample_size", 0.05))],
    "SapoLogRatioDrift": [(view(), diagnosed("log_ratio", -0.2))],
    "SapoRecordNotWritten": [(view(), replace(HEALTHY, record_full=True))],
}  # fmt: skip
QUIET: dict[str, tuple[dict[str, Any], Facts]] = {
    "healthy": (view(), HEALTHY),
    "not begun": (view(state="starting", step=0, workers=[]), replace(HEALTHY, steps=[], evaluations=[], saved_step=0)),
    "finished": (view(state="finished", workers=[]), HEALTHY),
    "Redis is away, so nothing is known": (
        {name: value for name, value in view(workers=[], ledger=None).items() if name != "accepted"}, HEALTHY
    ),
    "waits of the first minute": (view(), replace(HEALTHY, steps=[step(n, waited_seconds=9.0) for n in range(1, 8)])),
    "one step far off": (view(), replace(HEALTHY, steps=[*STEPS[:-1], step(20, diagnostics=OFF)])),
    "old waits": (view(), replace(HEALTHY, now=NOW + 1000, steps=[step(n, waited_seconds=9.0) for n in range(1, 21)])),
    "an old refusal": (view(), replace(HEALTHY, now=NOW + 1000, steps=[step(1, refusal="nan"), *STEPS])),
    "just behind": (view(workers=[worker(behind=4)]), HEALTHY),
    "no probe": (view(workers=[worker(probe=None)]), HEALTHY),
    "16 bits differ a little": (
        view(workers=[worker(probe={"max": 0.1, "mean": 0.001})]), replace(HEALTHY, dtype="bfloat16")
    ),
    "pass@1 was never worth much": (view(), evaluated(0.09, 0.01)),
    "noise": (view(), evaluated(0.4, 0.5, 0.3)),
    "figures that are none": (view(), diagnosed("log_ratio", float("nan"))),
}  # fmt: skip


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_it_fires_alone_and_says_what_to_do(name: str, case: tuple[dict[str, Any], Facts]) -> None:
    (alert,) = find(*case)
    assert alert["name"] == name
    assert alert["what"]
    assert alert["fix"]


@pytest.mark.parametrize("case", QUIET.values(), ids=QUIET)
def test_it_keeps_quiet(case: tuple[dict[str, Any], Facts]) -> None:
    assert find(*case) == []


def test_the_worst_comes_first() -> None:
    found = find(view(workers=[], unread=99), HEALTHY)
    assert [each["severity"] for each in found] == ["critical", "warning"]


def test_every_condition_has_a_case() -> None:
    named = re.findall(r'Alert\(\s*"(\w+)"', Path(alerts.__file__).read_text())
    assert set(named) == set(CASES)


def test_the_probe_s_bounds_are_the_worker_s() -> None:
    assert (alerts.PROBE_MAX_FLOAT32, alerts.PROBE_MEAN_SIXTEEN_BIT) == (probe.MAX_FLOAT32, probe.MEAN_SIXTEEN_BIT)


async def test_a_live_run_without_a_worker_has_its_alert(running: Running, learner: Learner) -> None:
    from services.control_plane.dashboard.look import look

    await learner.report("training", 1, record=line(1))
    found = await look(running.plane)
    assert [each["name"] for each in found["alerts"]] == ["SapoNoWorkers"]
    await running.store.erase()
    assert (await look(running.plane))["run"] == running.config.run.name


async def test_without_redis_the_page_says_so(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from sapo_learner.errors import Unavailable
    from services.control_plane.dashboard.look import look

    async def gone() -> Callable[..., Any]:
        raise Unavailable("Redis gives no answer")

    monkeypatch.setattr(running.plane, "status", gone)
    found = await look(running.plane)
    assert [each["name"] for each in found["alerts"]] == ["SapoRedisUnreachable"]
    assert found["ledger"] is None
