"""What people and scripts ask: the run's status, and its ledger as far as it can be told without the archive."""

import json
import time
from typing import Any

from sapo_learner.ledger import Ledger
from services.control_plane.evaluation_parts import shown
from services.control_plane.evaluations import Evaluations
from services.control_plane.record import Record
from services.runstore import RunState, Worker
from services.runtime.api import LearnerReport
from services.runtime.settings import RunConfig

EVALUATIONS_SHOWN = 50
SLOWEST_SHOWN = 3


def status(
    config: RunConfig,
    learner: LearnerReport,
    state: RunState,
    workers: list[Worker],
    evaluations: Evaluations,
    record: Record,
) -> dict[str, Any]:
    """state: the learner's, but "evaluating" after training while evaluations go on. workers: those alive."""
    finished = [shown(line) for line in record.recent.get("evaluation", [])]
    still_evaluating = learner.state == "finished" and bool(evaluations.open)
    return {
        "run": config.run.name,
        "state": "evaluating" if still_evaluating else learner.state,
        "steps": config.training.steps,
        "learner": learner.model_dump(),
        "last_step": record.last("step"),
        "evaluations": finished[-EVALUATIONS_SHOWN:],
        "evaluating": [{"id": each.id, "version": each.version} for each in evaluations.open],
        "unscored": record.last("unscored"),
        "workers": [json.loads(each.report_json) | {"age_seconds": each.age_seconds} for each in workers],
        "version": state.published_version,
        "published_step": state.published_step,
        "accepted": state.sequence,
        "unread": state.unread_entries,
        "unread_bytes": state.unread_bytes,
        "redis_memory_bytes": state.memory_used_bytes,
        "groups_ready": max(0, state.sequence - learner.cursor),  # Redis may have just been lost
        "open_leases": len(state.leases),
        "overdue_leases": sum(each.remaining_seconds < 0 for each in state.leases),
        "oldest_lease_seconds": state.oldest_lease_seconds,
        "reoffered": len(state.reoffered),
        "since": (record.last("session") or {"time": time.time()})["time"],
        "slowest_draws": [
            {"draw": each.draw, "attempt": each.attempt, "worker": each.worker, "age_seconds": each.age_seconds}
            for each in sorted(state.leases, key=lambda lease: -lease.age_seconds)[:SLOWEST_SHOWN]
        ],
    }


def ledger(learner: LearnerReport, state: RunState) -> dict[str, Any]:
    """Counts, and draws as a sum; `sapo ledger DIRECTORY` counts them one by one."""
    consumed = Ledger.from_dict(learner.ledger).consumed
    open_draws = len(state.leases) + len(state.reoffered)
    problems = []
    if consumed != learner.cursor:
        problems.append(f"outcomes sum to {consumed}, but the learner has consumed {learner.cursor} entries")
    groups = state.sequence - state.uncounted
    if state.next_draw - open_draws != groups:
        problems.append(f"{state.next_draw} draws less {open_draws} open ones are not the {groups} accepted groups")
    if state.sequence < learner.cursor:
        problems.append(f"the log ends at {state.sequence}, behind the {learner.cursor} that the learner has consumed")
    return {
        "accepted": state.sequence, **learner.ledger, "backlog": state.sequence - learner.cursor,
        "open_draws": open_draws, "problems": problems, "balanced": not problems,
    }  # fmt: skip
