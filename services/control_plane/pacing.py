"""How far sampling may run ahead of training, as the run is configured."""

from services.runstore import Pacing
from services.runtime.settings import RunConfig


def pacing_of(config: RunConfig) -> Pacing:
    training = config.training
    return Pacing(
        groups_per_step=training.groups_per_step,
        lookahead=config.lookahead,
        max_policy_age=training.max_policy_age,
        steps=training.steps,
        lease_seconds=config.pacing.lease_seconds,
        max_lease_seconds=config.pacing.max_lease_seconds,
    )
