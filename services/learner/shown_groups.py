"""Groups for people to look at: one of a step now and then, each token with what the objective made of it.

The figures are the step's own, so they cost no forward pass; only text is made of the tokens, and that seldom enough.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from sapo_learner.learner import Learner
from sapo_learner.token_figures import TokenFigures, trained_figures
from sapo_learner.train import StepReport
from sapo_learner.trajectory import Trajectory, TrajectoryGroup
from services.runtime.api import ShownGroup
from services.token_text import pieces

log = logging.getLogger(__name__)
EVERY_SECONDS = 1.0
COST = 50.0  # a group is shown at most every so many times the seconds that describing one takes
MOST_TOKENS = 8192  # of a group's responses together; of longer ones the beginnings are shown
MOST_CHARACTERS = 20_000  # of a prompt

Text = Callable[[list[int]], str | None]


@dataclass(frozen=True)
class TrainedGroup:
    """A group as a step has just trained on it."""

    entry: str
    step: int
    objective: str
    estimator: str
    group: TrajectoryGroup
    advantages: NDArray[np.float64]  # [G]
    figures: dict[int, TokenFigures]  # by response; one without sampled tokens has none


class Showcase:
    """Chooses groups in the training thread, and describes them in another."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._next = 0.0  # time.monotonic
        self._refused = False  # a group, and that it has been said

    def chosen(self, step: StepReport, learner: Learner) -> TrainedGroup | None:
        """The first group of the step that moves the policy, if it is time for one. learner: which has just done it."""
        if time.monotonic() < self._next or not step.sequences:
            return None
        self._next = time.monotonic() + EVERY_SECONDS
        number = step.sequences[0][0]
        group = step.groups[number]
        figures = {
            index: trained_figures(learner.figures, sequence_id, group.trajectories[index])
            for sequence_id, (owner, index) in enumerate(step.sequences)
            if owner == number
        }
        settings = learner.settings
        return TrainedGroup(
            step.entries[number], step.update.step, settings.objective.name, settings.advantages.estimator, group,
            step.advantages[number], figures,
        )  # fmt: skip

    def described(self, shown: TrainedGroup) -> ShownGroup | None:
        """Everything about it; None for one that the control plane would not take."""
        began = time.monotonic()
        try:
            return ShownGroup.model_validate(self._description(shown))
        except ValidationError as error:
            if not self._refused:
                log.warning("entry %s is not shown on the dashboard, nor are others like it: %s", shown.entry, error)
            self._refused = True
            return None
        finally:
            now = time.monotonic()
            self._next = max(self._next, now + COST * (now - began))

    def _description(self, shown: TrainedGroup) -> dict[str, Any]:
        group, prompt = shown.group, shown.group.prompt_ids.tolist()
        share = max(1, MOST_TOKENS // len(group.trajectories))
        gated = any(each.gate is not None for each in shown.figures.values())
        return {
            "entry": shown.entry, "step": shown.step,
            **{name: getattr(group, name) for name in ("draw", "task", "prompt_id", "worker", "engine")},
            "estimator": shown.estimator, "objective": shown.objective, "weight": "gate" if gated else "coefficient",
            "prompt": {"text": (self._text(prompt) or "")[:MOST_CHARACTERS], "tokens": len(prompt)},
            "cut": sum(max(0, len(each.token_ids) - share) for each in group.trajectories),
            "responses": [
                {
                    "response": index, "reward": each.reward, "rewards": dict(each.rewards),
                    "advantage": float(shown.advantages[index]), "finish_reason": each.finish_reason,
                    "tokens": self._tokens(shown, index, each, share),
                }
                for index, each in enumerate(group.trajectories)
            ],
        }  # fmt: skip

    def _tokens(self, shown: TrainedGroup, index: int, response: Trajectory, share: int) -> dict[str, list[Any]]:
        """Columns over the first `share` tokens; of one that the policy did not sample, only what it is."""
        ids, mask = response.token_ids[:share].tolist(), response.loss_mask[:share]
        figures, nothing = shown.figures.get(index), np.full(len(response.token_ids), np.nan)
        columns = {
            "behaviour_logprob": np.where(response.loss_mask, response.behaviour_logprobs, np.nan),
            "ratio": figures.ratio if figures else nothing,
            "gate_weight": figures.weight if figures else nothing,
            "coefficient": figures.coefficient if figures else nothing,
            "advantage": np.where(response.loss_mask, shown.advantages[index], np.nan),
        }
        return {
            "id": ids,
            "text": pieces(self._text, shown.group.prompt_ids.tolist(), ids),
            "mask": mask.tolist(),
            "version": response.token_versions()[:share].tolist(),
            **{name: [_short(value) for value in values[:share]] for name, values in columns.items()},
        }


def _short(value: float) -> float | None:
    """Six digits are more than anybody reads, and half the bytes."""
    return None if np.isnan(value) else float(f"{value:.6g}")
