"""What of a step somebody should read in the log; and at level DEBUG, what became of each of its groups."""

import logging

from sapo_learner.advantages import absent_components, component_names
from sapo_learner.config import LearnerSettings
from sapo_learner.diagnostics import advice
from sapo_learner.train import StepReport
from services.runtime.tracing import trace_id

log = logging.getLogger(__name__)


class Remarks:
    """Remembers what was said, so that it is not said at every step."""

    def __init__(self) -> None:
        self._lever = ""  # what the last warning named
        self._absent: set[str] = set()  # reward components that a warning has named

    def of(self, step: StepReport, settings: LearnerSettings) -> None:
        """settings: those that were in force."""
        number = step.update.step
        _tell_fates(step)
        for entry, reason in step.invalid.items():
            log.error("entry %s is invalid: %s", entry, reason, extra={"entry": entry})
        if warning := self._new_advice(step, settings):
            log.warning("step %d: %s", number, warning)
        self._warn_of_absent_components(step, settings)
        if step.update.refusal:
            log.error("step %d refused: %s", number, step.update.refusal)
        elif step.update.tokens and not step.update.applied:
            log.warning("step %d: the filters dropped every token, so the policy stays as it is", number)

    def _new_advice(self, step: StepReport, settings: LearnerSettings) -> str | None:
        """None when there is nothing new to change."""
        found = advice(step.update.diagnostics, settings.diagnostics.warn_spread)
        lever = found.rpartition(":")[2] if found else ""
        new, self._lever = lever != self._lever, lever
        return found if new else None

    def _warn_of_absent_components(self, step: StepReport, settings: LearnerSettings) -> None:
        """Once for each: only scored responses tell which components there are."""
        for name in absent_components(step.groups, settings.advantages):
            if name not in self._absent:
                there = ", ".join(component_names(step.groups))
                what = "no response of step %d has such a reward component (they have %s)"
                log.warning(f"advantages.weights.%s has no effect: {what}", name, step.update.step, there)
            self._absent.add(name)


def _tell_fates(step: StepReport) -> None:
    if not log.isEnabledFor(logging.DEBUG):
        return
    known = dict(zip(step.entries, step.groups, strict=True))
    for entry, fate in step.fates.items():
        fields: dict[str, object] = {"entry": entry}
        if group := known.get(entry):
            fields |= {"draw": group.draw, "attempt": group.attempt, "trace_id": trace_id(group.traceparent)}
        log.debug("entry %s is %s in step %d", entry, fate.value, step.update.step, extra=fields)
