"""REINFORCE Leave-One-Out (RLOO), Kool et al. 2019; for language models Ahmadian et al., arXiv 2402.14740.

    grad J = E[ 1/G sum_i A_i grad log pi_theta(y_i) ],      A_i = R_i - 1/(G-1) sum_{j != i} R_j

The estimator is everything: the update is `reinforce`, so `check` refuses a run whose advantages are others. The papers
sum log pi over the tokens of a response (aggregation constant, up to a factor); sequence_mean divides by its length.
"""

from sapo_learner.config import LearnerSettings
from sapo_learner.errors import ConfigError
from sapo_learner.objectives.reinforce import REINFORCE


class RLOO(REINFORCE):
    """Options and diagnostics of reinforce."""

    source = "arXiv 2402.14740"

    def check(self, settings: LearnerSettings) -> None:
        estimator = settings.advantages.estimator
        if estimator != "leave_one_out":
            raise ConfigError(
                f"rloo is REINFORCE with the leave-one-out advantage, and advantages.estimator is {estimator!r}",
                where="objective 'rloo'",
                fix="set advantages.estimator: leave_one_out, or take objective reinforce",
            )
