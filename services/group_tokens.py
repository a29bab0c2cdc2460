"""One archived group token by token: what was recorded, and what the objective makes of it under a policy that is kept.

At the group's step n the learner had the policy after n - 1 optimizer steps. Of the kept checkpoints and published
snapshots the nearest to it is taken, and it is always said which one that is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sapo_learner import skips
from sapo_learner.archive import Archive, Entry
from sapo_learner.control import GROUP
from sapo_learner.errors import ConfigError
from sapo_learner.steps import Step
from sapo_learner.trajectory import Trajectory, TrajectoryGroup
from services.archive_tools import find, learned, open_archive, step_of, text_of
from services.kept_policies import nearest_policy
from services.run_directory import run_config
from services.token_text import pieces
from services.wire import decode

if TYPE_CHECKING:
    from sapo_learner.learner import Learner
    from sapo_learner.policy import Policy
    from sapo_learner.token_figures import TokenFigures

NEED_POLICY = ("gate", "ratio")
Text = Callable[[list[int]], str | None]


@dataclass(frozen=True)
class GivenPolicy:
    """A policy that was asked for by name."""

    name: str
    load: Callable[[], "Policy"]


@dataclass(frozen=True)
class _Found:
    """A group of the archive, its step as far as it is known, and its advantages as far as they are."""

    directory: Path
    archive: Archive
    entry: Entry
    group: TrajectoryGroup
    step: Step | None
    facts: dict[str, Any]

    @property
    def advantages(self) -> list[float] | None:
        known: list[float] | None = self.facts["advantages"]
        return known


def look(directory: Path, wanted: str, by: str, given: GivenPolicy | None = None) -> dict[str, Any]:
    """Everything that `sapo show` tells, ready for JSON; figures of a token that are not there are None.

    wanted: as `find` takes it. by: gate, ratio, advantage, version or logprob. The first two need a policy; where there
    is none, `by` of the answer is another and `note` says why. Raises ConfigError for an entry that is no group,
    InvalidTrajectory for one that cannot be read, and what `find` and reading a policy raise.
    """
    found = _find(directory, wanted)
    figures, policy, note = None, None, ""
    if by in NEED_POLICY:
        figures, policy, note = _judged(found, given)
        by = by if figures else _without_policy(found.group)
    return {
        **_facts(found), "by": by, "weight": _weight_name(figures), "policy": policy, "note": note,
        **_texts(found, figures),
    }  # fmt: skip


def _find(directory: Path, wanted: str) -> _Found:
    archive = open_archive(directory)
    entry = find(archive, wanted)
    if entry.kind != GROUP:
        fix = "`sapo archive RUN --show ENTRY` prints it"
        raise ConfigError(f"entry {entry.id} is no group but of kind {entry.kind!r}", where=wanted, fix=fix)
    group, (step, _) = decode(entry.payload), step_of(directory, archive, entry)
    return _Found(directory, archive, entry, group, step, learned(directory, archive, entry, group))


def _without_policy(group: TrajectoryGroup) -> str:
    """What there is to see all the same."""
    versions = {span.version for each in group.trajectories for span in each.spans}
    return "version" if len(versions) > 1 else "logprob"


def _judged(found: _Found, given: GivenPolicy | None) -> tuple["list[TokenFigures] | None", dict[str, Any] | None, str]:
    """Figures of each response, the policy that they are of, and the reason where there are none."""
    if found.step is None:
        return None, None, f"neither its settings nor its policy are known: {found.facts['advantages_note']}"
    trained_under = found.step.number - 1
    if given:
        policy, facts = given.load(), {"kind": given.name, "step": None, "trained_under": trained_under}
    else:
        kept = nearest_policy(found.directory, found.archive, trained_under)
        if kept is None:
            return None, None, "no policy of this run is kept, neither as a checkpoint nor as a snapshot"
        policy, facts = kept.load(), {"kind": kept.kind, "step": kept.step, "trained_under": trained_under}
    return _figures(_learner(policy, found, found.step), found, found.step), facts, ""


def _learner(policy: "Policy", found: _Found, step: Step) -> "Learner":
    """As it was before the group's step, but for the weights."""
    from sapo_learner import pins
    from sapo_learner.learner import Learner

    pins.recall(found.directory)
    pins.require_current(step.settings, found.directory)
    learner = Learner(policy, step.settings, temperature=run_config(found.directory).sampling.temperature)
    learner.step_count = step.number - 1
    return learner


def _figures(learner: "Learner", found: _Found, step: Step) -> "list[TokenFigures]":
    from sapo_learner.token_figures import token_figures

    own = np.zeros(len(found.group.trajectories)) if found.advantages is None else np.array(found.advantages)
    groups, advantages = {found.entry.id: found.group}, {found.entry.id: own}
    if learner.objective.needs_step and not step.missing:
        left_out = skips.read(found.archive.directory)
        groups, advantages = (
            step.groups(decode, left_out) | groups, step.advantages(decode, left_out) | advantages
        )  # fmt: skip
    return token_figures(learner, found.group, [*groups.values()], [advantages[each] for each in groups])


# ---- the answer


def _facts(found: _Found) -> dict[str, Any]:
    group, facts = found.group, found.facts
    return {
        "entry": found.entry.id,
        **{name: getattr(group, name) for name in ("draw", "task", "prompt_id", "worker", "engine")},
        **{name: facts[name] for name in ("step", "estimator", "advantages_note")},
        "objective": found.step.settings.objective.name if found.step else None,
    }


def _weight_name(figures: "Sequence[TokenFigures] | None") -> str | None:
    return None if not figures else "coefficient" if figures[0].gate is None else "gate"


def _texts(found: _Found, figures: "Sequence[TokenFigures] | None") -> dict[str, Any]:
    group, text = found.group, text_of(found.directory / "model")
    prompt = group.prompt_ids.tolist()
    return {
        "prompt": {"tokens": prompt, "text": text(prompt)},
        "responses": [
            {
                "response": number, "reward": each.reward, "rewards": dict(each.rewards),
                "advantage": None if found.advantages is None else found.advantages[number],
                "finish_reason": each.finish_reason,
                "tokens": _tokens(found, number, each, text, figures[number] if figures else None),
            }
            for number, each in enumerate(group.trajectories)
        ],
    }  # fmt: skip


def _tokens(
    found: _Found, number: int, response: Trajectory, text: Text, figures: "TokenFigures | None"
) -> list[dict[str, Any]]:
    """Of a token that the policy did not sample, only what it is."""
    nothing = [None] * len(response.token_ids)
    judged = figures is not None and found.advantages is not None  # without an advantage there is no weight
    columns = {
        "id": response.token_ids.tolist(),
        "text": pieces(text, found.group.prompt_ids.tolist(), response.token_ids.tolist()),
        "mask": response.loss_mask.tolist(),
        "version": response.token_versions().tolist(),
        "behaviour_logprob": np.where(response.loss_mask, response.behaviour_logprobs, np.nan).tolist(),
        "logprob": figures.logprobs.tolist() if figures else nothing,
        "ratio": figures.ratio.tolist() if figures else nothing,
        "gate_weight": figures.weight.tolist() if figures and judged else nothing,
        "coefficient": figures.coefficient.tolist() if figures and judged else nothing,
    }
    advantage = None if found.advantages is None else found.advantages[number]
    return [
        {name: None if value is None or value != value else value for name, value in zip(columns, row, strict=True)}
        | {"advantage": advantage if row[2] else None}
        for row in zip(*columns.values(), strict=True)
    ]
