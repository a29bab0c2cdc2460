"""What an objective makes of each token of one group: under a policy that is given, or as it was trained on.

Under a given policy (`sapo show`) the tokens go the way that they go in training: packed, the learner's own forward
pass, the objective under the run's settings. Nothing is updated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from sapo_learner.advantages import Vector
from sapo_learner.batching import collate
from sapo_learner.diagnostics import coefficients
from sapo_learner.learner import Learner
from sapo_learner.objectives import Objective, Tokens, concatenated
from sapo_learner.proximal import anchored, decoupled
from sapo_learner.step_report import StepFigures
from sapo_learner.trajectory import Trajectory, TrajectoryGroup

Values = NDArray[np.float64]


@dataclass(frozen=True)
class TokenFigures:
    """Of the tokens of one response, [T] each, NaN where the policy did not sample the token.

    logprobs: under the policy, of a trained token no farther from the recorded one than where the ratio is cut off.
    ratio: to the behaviour policy, cut off as in training. coefficient: see sapo_learner.diagnostics. gate: None where
    the objective has none.
    """

    logprobs: Values
    ratio: Values
    coefficient: Values
    gate: Values | None

    @property
    def weight(self) -> Values:
        """The gate; where there is none, the coefficient. 1 is the plain policy gradient in both."""
        return self.coefficient if self.gate is None else self.gate


def trained_figures(figures: StepFigures, sequence_id: int, response: Trajectory) -> TokenFigures:
    """Of a response that the learner has just trained on. figures: that step's. sequence_id: the response's in it."""
    found = figures.of_sequence(sequence_id)
    found["ratio"] = np.exp(found["log_ratio"])
    found["logprobs"] = response.behaviour_logprobs[response.loss_mask] + found["log_ratio"]
    wanted = [name for name in ("logprobs", "ratio", "coefficient", "gate") if name in found]
    columns = {name: np.full(len(response.token_ids), np.nan) for name in wanted}
    for name, values in columns.items():
        values[response.loss_mask] = found[name]
    return TokenFigures(columns["logprobs"], columns["ratio"], columns["coefficient"], columns.get("gate"))


def token_figures(
    learner: Learner, wanted: TrajectoryGroup, groups: Sequence[TrajectoryGroup], advantages: Sequence[Vector]
) -> list[TokenFigures]:
    """One for each response of `wanted`, which is one of `groups`, those of its whole step. advantages: one [G] each.

    learner: with the policy and the settings of that step; its `step_count` is what ages are counted from. The other
    groups are looked at only under an objective whose constants depend on the whole step.
    """
    learning = learner.objective
    if learning.needs_step:
        pairs = [(group, each) for group, each in zip(groups, advantages, strict=True) if each.any()]
        learning = learning.prepare(_together([_tokens(learner, group, each) for group, each in pairs]))
    own = next(each for group, each in zip(groups, advantages, strict=True) if group.draw == wanted.draw)
    columns = _columns(learner, learning, _tokens(learner, wanted, own))
    return [*_split(wanted, columns)]


def _tokens(learner: Learner, group: TrajectoryGroup, advantages: Vector) -> Tokens:
    """Of all responses with a sampled token, one behind the other, without gradient."""
    stand_in = np.ones(len(group.trajectories))  # a group without signal would be left out
    budget = learner.settings.training.microbatch_tokens
    batch = collate([group], [stand_in], step=learner.step_count, microbatch_tokens=budget)
    with torch.no_grad():
        tokens = concatenated([replace(learner.tokens(each), hidden=None) for each in batch.microbatches])
    sampled = [index for index, each in enumerate(group.trajectories) if each.loss_mask.any()]
    known = torch.from_numpy(advantages[sampled])[tokens.sequence_ids.cpu()]
    tokens = replace(tokens, advantages=known.to(tokens.logprobs))
    if learner.settings.proximal.mode == "recompute":  # at the step's start, which is where we are
        tokens = replace(tokens, proximal_logprobs=tokens.logprobs)
    return tokens


def _together(parts: Sequence[Tokens]) -> Tokens:
    """As the objective sees the step, each response with an id of its own."""
    shifted, first = [], 0
    for each in parts:
        shifted.append(anchored(replace(each, sequence_ids=each.sequence_ids + first)))
        first += int(each.sequence_ids.max()) + 1
    return concatenated(shifted)


def _columns(learner: Learner, objective: Objective, tokens: Tokens) -> dict[str, Values]:
    """name -> [T] over the tokens of all responses."""
    tokens = replace(tokens, logprobs=tokens.logprobs.detach().requires_grad_())
    surrogate = decoupled(objective, tokens, learner.settings.proximal.bound)
    found = {
        "logprobs": tokens.logprobs,
        "ratio": tokens.log_ratio.exp(),
        "coefficient": coefficients(tokens, surrogate),
    } | {name: each for name, each in surrogate.diagnostics.items() if name == "gate"}
    mask = tokens.loss_mask
    return {name: torch.where(mask, each.detach(), torch.nan).double().cpu().numpy() for name, each in found.items()}


def _split(group: TrajectoryGroup, columns: dict[str, Values]) -> list[TokenFigures]:
    """By response; those without a sampled token are in no column."""
    found, first = [], 0
    for each in group.trajectories:
        count = len(each.token_ids)
        if each.loss_mask.any():
            own = {name: values[first : first + count] for name, values in columns.items()}
            first += count
        else:
            own = {name: np.full(count, np.nan) for name in columns}
        found.append(TokenFigures(own["logprobs"], own["ratio"], own["coefficient"], own.get("gate")))
    return found
