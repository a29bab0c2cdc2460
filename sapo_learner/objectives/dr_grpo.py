"""Dr. GRPO ("GRPO done right"), Liu et al., arXiv 2503.20783: GRPO without its two normalisations.

    J = E[ 1/G sum_i 1/L sum_t min( r_it A_i, clip(r_it, 1 - clip_low, 1 + clip_high) A_i ) ],   A_i = R_i - mean_j R_j

L is one constant for all responses instead of |y_i|, and the advantage is not divided by the standard deviation of the
group's rewards. The token loss is GRPO's; the two differences are settings, which this objective insists on:

    aggregation: {mode: constant, length: L}        advantages: {std: none}
"""

from sapo_learner.config import LearnerSettings
from sapo_learner.errors import ConfigError
from sapo_learner.objectives.grpo import GRPO


class DrGRPO(GRPO):
    """Diagnostics: those of grpo."""

    source = "arXiv 2503.20783"

    def check(self, settings: LearnerSettings) -> None:
        wanted = []
        if settings.aggregation.mode != "constant":
            wanted.append("aggregation.mode=constant with aggregation.length, usually the token limit of a response")
        if settings.advantages.estimator != "group":
            wanted.append("advantages.estimator=group")
        if settings.advantages.std != "none":
            wanted.append("advantages.std=none")
        if wanted:
            raise ConfigError(
                "Dr. GRPO divides neither by a response's length nor by the standard deviation of its group",
                where="objective.name dr_grpo", fix=f"set {' and '.join(wanted)}, or use grpo",
            )  # fmt: skip
