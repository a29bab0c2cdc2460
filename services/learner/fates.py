"""What became of each group of a step, in the log at level DEBUG: the end of its way."""

import logging

from sapo_learner.train import StepReport
from services.runtime.tracing import trace_id

log = logging.getLogger(__name__)


def tell(step: StepReport) -> None:
    if not log.isEnabledFor(logging.DEBUG):
        return
    known = dict(zip(step.entries, step.groups, strict=True))
    for entry, fate in step.fates.items():
        fields: dict[str, object] = {"entry": entry}
        if group := known.get(entry):
            fields |= {"draw": group.draw, "attempt": group.attempt, "trace_id": trace_id(group.traceparent)}
        log.debug("entry %s is %s in step %d", entry, fate.value, step.update.step, extra=fields)
