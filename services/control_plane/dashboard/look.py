"""What the page shows of the moment: the run's status without what is long, its services, its ledger, its alerts."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sapo_learner.errors import Unavailable
from services.control_plane import unscored
from services.control_plane.dashboard import alerts

if TYPE_CHECKING:
    from services.control_plane.plane import ControlPlane

SILENT_SECONDS = 10.0  # after which a learner that reports every second counts as silent
_WORKER = (
    "worker", "version", "step", "rows", "tokens", "tokens_per_second", "waiting_for", "probe", "age_seconds",
    "mixed_version_responses",
)  # fmt: skip
_RUN = (
    "run", "state", "steps", "version", "published_step", "accepted", "unread", "groups_ready", "open_leases",
    "reoffered", "since", "evaluating", "slowest_draws",
)  # fmt: skip


async def look(plane: "ControlPlane") -> dict[str, Any]:
    """Of a run that goes on; while Redis gives no answer, what is known without it."""
    redis, status, ledger = "", None, None
    try:
        status, ledger = await plane.status(), await plane.ledger()
    except Unavailable as error:
        redis = str(error)
    silent = None if plane.learner_heard is None else time.monotonic() - plane.learner_heard
    view = {
        "run": plane.config.run.name,
        "steps": plane.config.training.steps,
        "state": plane.learner.state,
        **({name: status[name] for name in _RUN} if status else {}),
        "step": plane.learner.step,
        "ledger": ledger,
        "workers": [_worker(each, status["published_step"]) for each in status["workers"]] if status else [],
        "gone": plane.workers.gone(),
        "services": _services(plane, redis, silent),
        "notes": _notes(status) if status else [],
        "time": time.time(),
    }
    return view | {"alerts": alerts.find(view, alerts.Facts.of(plane, status["unread_bytes"] if status else 0))}


def _worker(report: Mapping[str, Any], published: int | None) -> dict[str, Any]:
    shown = {name: report.get(name) for name in _WORKER}
    return shown | {"behind": max(0, (published or 0) - int(report["step"]))}


def _services(plane: "ControlPlane", redis: str, silent: float | None) -> list[dict[str, Any]]:
    learner = plane.learner
    gone = silent is not None and silent > SILENT_SECONDS and learner.state != "finished"
    state = f"silent for {silent:.0f} s" if gone else learner.state
    return [
        {"name": "control plane", "ok": True, "state": "serving", "waiting_for": ""},
        {"name": "Redis", "ok": not redis, "state": "no answer" if redis else "answers", "waiting_for": redis},
        {"name": "learner", "ok": not gone, "state": state, "waiting_for": learner.waiting_for},
    ]


def _notes(status: Mapping[str, Any]) -> list[str]:
    notes = dict.fromkeys(str(note) for each in status["workers"] for note in each.get("notes", []))
    return [*([unscored.said(status["unscored"])] if status["unscored"] else []), *notes][:20]
