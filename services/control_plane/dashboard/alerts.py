"""What of a run wants a person: each with its name, what is wrong, and what to do.

The names are those of the Prometheus rules, where there is such a rule.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from services.control_plane.dashboard.figures import number

if TYPE_CHECKING:
    from services.control_plane.plane import ControlPlane

Line = Mapping[str, Any]
View = Mapping[str, Any]
STARVED_SHARE, STARVED_SECONDS = 0.9, 600.0
NEARLY_FULL = 0.8
REFUSED_SECONDS = 600.0
SUSTAINED = 20  # steps, in each of which it is so
LEAST_SAMPLE_SIZE, MOST_LOG_RATIO = 0.1, 0.1
CHECKPOINTS_MISSED = 2
COLLAPSED, WORTH = 0.5, 0.1  # of the best pass@1, which was at least so much
PROBE_MAX_FLOAT32, PROBE_MEAN_SIXTEEN_BIT = 1e-4, 0.05  # as in sapo_learner.probe, which needs torch


class Alert(NamedTuple):
    name: str
    severity: str
    what: str
    fix: str


@dataclass(frozen=True)
class Facts:
    """What the conditions need besides the page's own figures. steps, evaluations: newest lines of the record."""

    dtype: str
    max_policy_age: int
    checkpoint_every: int
    max_entries: int
    max_bytes: int
    unread_bytes: int = 0
    steps: Sequence[Line] = ()
    evaluations: Sequence[Line] = ()
    probe: Line | None = None
    saved_step: int = 0
    record_full: bool = False
    now: float = field(default_factory=time.time)

    @classmethod
    def of(cls, plane: "ControlPlane", unread_bytes: int) -> "Facts":
        config, recent = plane.config, plane.record.recent
        return cls(
            dtype=config.policy.dtype, max_policy_age=config.training.max_policy_age,
            checkpoint_every=config.checkpoint.every,
            max_entries=config.ingest.max_entries, max_bytes=config.ingest.max_bytes, unread_bytes=unread_bytes,
            steps=[*recent.get("step", ())], evaluations=[*recent.get("evaluation", ())],
            probe=plane.record.last("probe"), saved_step=plane.history.saved_step, record_full=plane.record.full,
        )  # fmt: skip


def find(view: View, facts: Facts) -> list[dict[str, str]]:
    """Those that hold now, the worst first."""
    found = [alert for condition in _CONDITIONS for alert in condition(view, facts)]
    return [alert._asdict() for alert in sorted(found, key=lambda alert: alert.severity != "critical")]


def _ledger(view: View, _: Facts) -> Iterator[Alert]:
    if view["ledger"] and not view["ledger"]["balanced"]:
        what = "the ledger does not balance: " + "; ".join(view["ledger"]["problems"])
        yield Alert(
            "SapoLedgerUnbalanced", "critical", what, "`sapo ledger RUN` counts every draw; keep the run's directory"
        )


def _workers(view: View, facts: Facts) -> Iterator[Alert]:
    if view["state"] == "training" and "accepted" in view and not view["workers"]:
        yield Alert("SapoNoWorkers", "critical", "no rollout worker is heard of: everybody waits for one",
                    "start one, or see why they ended: their logs")  # fmt: skip
    stale = [each["worker"] for each in view["workers"] if each["behind"] > facts.max_policy_age]
    if stale:
        what = f"{', '.join(stale[:5])}: serves a policy more than {facts.max_policy_age} steps old"
        yield Alert("SapoWorkersStale", "warning", what, "is the control plane's blob store reached from there?")


def _services(view: View, _: Facts) -> Iterator[Alert]:
    for each in view["services"]:
        if not each["ok"] and each["name"] == "learner":
            yield Alert("SapoLearnerSilent", "critical", f"the learner is {each['state']}", "see its log, or start it")
        elif not each["ok"]:
            yield Alert("SapoRedisUnreachable", "critical", each["waiting_for"], "start it again: nothing is lost")


def _starved(view: View, facts: Facts) -> Iterator[Alert]:
    """From the steps that ended in the last ten minutes, if they are most of that time."""
    recent = [line for line in facts.steps if (number(line.get("ended")) or 0.0) > facts.now - STARVED_SECONDS]
    waited = sum(number(line.get("waited_seconds")) or 0.0 for line in recent[1:])
    worked = sum((number(line.get("ended")) or 0.0) - (number(line.get("started")) or 0.0) for line in recent[1:])
    whole = waited + worked
    if view["state"] == "training" and whole > STARVED_SECONDS / 2 and waited > STARVED_SHARE * whole:
        what = f"the learner waited for groups for {waited / whole:.0%} of the last ten minutes"
        yield Alert("SapoLearnerStarved", "warning", what, "add rollout workers, or raise pacing.lookahead")


def _probe(view: View, facts: Facts) -> Iterator[Alert]:
    """Engines against the learner, as their workers have measured, and the recorded log-probs against the snapshots."""
    exact = facts.dtype == "float32"
    name, bound = ("max", PROBE_MAX_FLOAT32) if exact else ("mean", PROBE_MEAN_SIXTEEN_BIT)
    fix = "`sapo check RUN` says what differs; what such an engine samples is not what the learner believes"
    for each in view["workers"]:
        figure = number((each["probe"] or {}).get(name))
        if figure is not None and figure > bound:
            what = f"{each['worker']}: its engine's log-probs are off by {figure:.2g} nats ({name}; bound {bound:g})"
            yield Alert("SapoProbeMismatch", "critical", what, fix)
    recorded = number((facts.probe or {}).get("max_abs_diff"))
    if exact and recorded is not None and recorded > PROBE_MAX_FLOAT32:
        what = f"recorded log-probs are off by {recorded:.2g} nats from those of their own snapshots"
        yield Alert("SapoProbeMismatch", "critical", what, fix)


def _refused(_: View, facts: Facts) -> Iterator[Alert]:
    for line in reversed(facts.steps):
        if line.get("refusal") and (number(line.get("ended")) or 0.0) > facts.now - REFUSED_SECONDS:
            yield Alert("SapoUpdateRefused", "warning", f"step {line['step']} was refused: {line['refusal']}",
                        "one may happen; if they go on, lower optimizer.learning_rate")  # fmt: skip
            return


def _log(view: View, facts: Facts) -> Iterator[Alert]:
    entries, size = view.get("unread", 0) / facts.max_entries, facts.unread_bytes / facts.max_bytes
    if max(entries, size) > NEARLY_FULL:
        what = f"unread groups fill {max(entries, size):.0%} of what the log in Redis may hold"
        yield Alert(
            "SapoLogNearlyFull", "warning", what, "does the learner read? Sampling slows by itself, nothing is lost"
        )


def _checkpoint(view: View, facts: Facts) -> Iterator[Alert]:
    behind = view["step"] - facts.saved_step
    if behind > CHECKPOINTS_MISSED * facts.checkpoint_every:
        what = f"the newest checkpoint is of step {facts.saved_step}, {behind} steps ago"
        yield Alert("SapoCheckpointTooOld", "warning", what, "is there room on the learner's disk?")


def _pass_at_1(_: View, facts: Facts) -> Iterator[Alert]:
    rates = [(rate, line) for line in facts.evaluations if (rate := number(line.get("pass_at_1"))) is not None]
    if len(rates) < 2:
        return
    (best, then), (now, newest) = max(rates, key=lambda each: each[0]), rates[-1]
    error = number(newest.get("standard_error")) or 0.0
    if best > WORTH and now + 2 * error < COLLAPSED * best:
        what = f"held-out pass@1 fell from {best:.3f} at step {then['step']} to {now:.3f} at step {newest['step']}"
        fix = "go back with `sapo up --back-to` to before, and lower optimizer.learning_rate"
        yield Alert("SapoPassAt1Collapse", "critical", what, fix)


def _last(facts: Facts, name: str) -> list[float]:
    """A diagnostic of all tokens in each of the last steps; [] where some have none, or where there are too few."""
    lines = facts.steps[-SUSTAINED:]
    found = [number((line.get("diagnostics") or {}).get(name, {}).get("all")) for line in lines]
    known = [each for each in found if each is not None]
    return known if len(known) == SUSTAINED else []


def _sample_size(_: View, facts: Facts) -> Iterator[Alert]:
    found = _last(facts, "effective_sample_size")
    if found and max(found) < LEAST_SAMPLE_SIZE:
        what = f"the effective sample size of a step is at most {max(found):.1%} of its tokens: a few decide it"
        yield Alert("SapoEffectiveSampleSizeCollapse", "warning", what, "lower pacing.lookahead, or a filter by age")


def _drift(_: View, facts: Facts) -> Iterator[Alert]:
    found = _last(facts, "log_ratio")
    if found and (min(found) > MOST_LOG_RATIO or max(found) < -MOST_LOG_RATIO):
        mean = sum(found) / len(found)
        what = f"the mean log-ratio is {mean:+.3f} over the last {SUSTAINED} steps: data and policy are far apart"
        yield Alert(
            "SapoLogRatioDrift", "warning", what, "`sapo check` compares engine and learner; lower the learning rate"
        )


def _record(_: View, facts: Facts) -> Iterator[Alert]:
    if facts.record_full:
        yield Alert("SapoRecordNotWritten", "warning", "the run's record cannot be written: its lines wait in memory",
                    "make room on the control plane's disk")  # fmt: skip


_CONDITIONS: tuple[Callable[[View, Facts], Iterator[Alert]], ...] = (
    _ledger, _workers, _services, _starved, _probe, _refused, _log, _checkpoint, _pass_at_1, _sample_size,
    _drift, _record,
)  # fmt: skip
