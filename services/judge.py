"""A run's directory judged: every archived token recomputed from the published policy that it names.

Everything goes the long way round: the log as the learner reads it, manifests and blobs as the control plane serves
them, digests verified, the learner's own model code. Nothing here depends on which engine sampled.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sapo_learner import skips
from sapo_learner.advantages import Vector
from sapo_learner.archive import Archive
from sapo_learner.control import GROUP
from sapo_learner.errors import NotFound
from sapo_learner.manifest import Manifest
from sapo_learner.steps import beginning, steps
from sapo_learner.trajectory import Trajectory, TrajectoryGroup
from services.control_plane.record import read
from services.diagnosis import Evidence, Verdict, diagnose
from services.run_directory import run_config
from services.runtime.settings import RunConfig
from services.wire import decode

if TYPE_CHECKING:
    from sapo_learner.agreement import Recomputed, TokenTable
    from sapo_learner.policy import Policy


@dataclass(frozen=True)
class Judgement:
    """figures: everything that is reported beside the verdict, ready for JSON."""

    verdict: Verdict
    table: "TokenTable"
    figures: dict[str, Any]

    @property
    def carried(self) -> int:
        """Tokens whose response had begun under another version."""
        return int(self.table.changed.sum())

    def to_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict.to_dict(), **self.figures}


def judge(directory: Path) -> Judgement:
    """Read a run that nobody writes to now. The whole archive must be there, and every version that sampled a token.

    Raises NotFound for what is not there, Mismatch for a snapshot that is not what its digest says.
    """
    config = run_config(directory)
    archive = Archive(directory / "archive", None)
    groups = [decode(each.payload) for each in archive.entries() if each.kind == GROUP]
    if not groups:
        raise NotFound("the archive holds no group", where=str(directory), fix="let the run do at least one step")
    policies = _Policies(directory)
    policies.read({span.version for group in groups for each in group.trajectories for span in each.spans})
    table = _table(groups, config, policies, _advantages(directory, archive, groups))
    evidence = Evidence(
        table, config.sampling.temperature, config.policy.dtype, partial(_rounding, groups, config, policies)
    )  # fmt: skip
    return Judgement(diagnose(evidence), table, _figures(directory, config, groups, table, policies))


class _Policies:
    """Published versions, loaded one at a time into one model."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "snapshots"
        self._model = directory / "model"
        self._spare: Policy | None = None
        self._loaded = -1
        self._first_of: dict[str, int] = {}  # digest -> version
        self.manifests: dict[int, Manifest] = {}

    def load(self, version: int) -> "Policy":
        """Its digests are verified once more."""
        from sapo_learner.policy import load_policy, load_weights
        from sapo_learner.snapshot import read_snapshot

        if self._spare is None:
            self._spare = load_policy(self._model, weights=False)
        if version != self._loaded:
            manifest = self._manifest(version)
            load_weights(self._spare, read_snapshot(manifest, lambda sha256: self._directory / "blobs" / sha256))
            self._loaded = version
        return self._spare

    def load_rounded(self, version: int) -> "Policy":
        """The same in bfloat16, as a model of its own."""
        import torch

        from sapo_learner.policy import load_policy, load_weights

        rounded = load_policy(self._model, weights=False)
        load_weights(rounded, self.load(version).tensors())
        for parameter in rounded.model.parameters():  # not the buffers: engines keep rotary angles in float32, too
            parameter.data = parameter.data.to(torch.bfloat16)
        return rounded

    def weights(self, response: Trajectory) -> NDArray[np.int64]:
        """[T]: of each token the lowest version that had the very weights it was sampled with."""
        versions, where = np.unique(response.token_versions(), return_inverse=True)
        same = [self._first_of.setdefault(self._manifest(int(each)).digest, int(each)) for each in versions]
        weights: NDArray[np.int64] = np.array(same, np.int64)[where]
        return weights

    def read(self, versions: Iterable[int]) -> None:
        """Name equal weights by their lowest version: a learner that stands still, or starts again, publishes anew."""
        for version in sorted(versions):
            self._first_of.setdefault(self._manifest(version).digest, version)

    def _manifest(self, version: int) -> Manifest:
        path = self._directory / "manifests" / f"{version:08d}.json"
        if not path.is_file():
            raise NotFound(
                f"version {version} sampled tokens, but is not kept", where=str(self._directory),
                fix="judge a run with training.max_policy_age no smaller than its steps",
            )  # fmt: skip
        return self.manifests.setdefault(version, Manifest.from_json(path.read_bytes(), where=str(path)))


Place = tuple[int, int]  # of a response: group, and which of its responses


def _responses(groups: Iterable[TrajectoryGroup]) -> Iterator[tuple[Place, TrajectoryGroup, Trajectory]]:
    for number, group in enumerate(groups):
        for index, response in enumerate(group.trajectories):
            if response.loss_mask.any():
                yield (number, index), group, response


def _advantages(directory: Path, archive: Archive, groups: list[TrajectoryGroup]) -> dict[int, Vector]:
    """Draw -> the advantages that its group is trained with; NaN where no complete step has it, or leaves it out."""
    begin = beginning(directory / "checkpoints", archive, 1)
    found: dict[int, Vector] = {each.draw: np.full(len(each.trajectories), np.nan) for each in groups}
    for step in steps(archive, begin) if begin else ():
        if not step.missing:
            advantages = step.advantages(decode, skips.read(archive.directory))
            found |= {each.draw: advantages[each.id] for each in step.entries if each.id in advantages}
    return found


def _table(
    groups: list[TrajectoryGroup], config: RunConfig, policies: _Policies, advantages: Mapping[int, Vector]
) -> "TokenTable":
    """Version by version, so that each is loaded once; the first one for all tokens, to see how far the others went."""
    from sapo_learner.agreement import TokenTable, recompute

    temperature = config.sampling.temperature
    versions = {place: policies.weights(response) for place, _, response in _responses(groups)}
    known = sorted({int(each) for row in versions.values() for each in row})
    own: dict[Place, dict[int, Recomputed]] = defaultdict(dict)
    for version in known:
        policy = policies.load(version)
        for place, group, response in _responses(groups):
            if version == known[0] or version in versions[place]:
                own[place][version] = recompute(policy, group.prompt_ids, response.token_ids, temperature)
    oldest: dict[bytes, int] = {}  # prompt -> the first version that answered it
    for place, group, _ in _responses(groups):
        prompt = group.prompt_ids.tobytes()
        oldest[prompt] = min(oldest.get(prompt, 1 << 62), int(versions[place].min()))
    return TokenTable.concatenate(
        [
            _rows(
                response, versions[place], own[place], oldest[group.prompt_ids.tobytes()],
                number=number, advantage=float(advantages[group.draw][place[1]]),
            )
            for number, (place, group, response) in enumerate(_responses(groups))
        ]
    )  # fmt: skip


def _rows(
    response: Trajectory, version: NDArray[np.int64], own: Mapping[int, "Recomputed"], oldest: int,
    *, number: int, advantage: float,
) -> "TokenTable":  # fmt: skip
    """Of the tokens that the policy sampled, each under the version ([T]) whose weights it was sampled with."""
    from sapo_learner.agreement import TokenTable

    count = len(response.token_ids)

    def pick(name: str) -> NDArray[np.float64]:
        values: NDArray[np.float64] = np.select(
            [version == number for number in own], [getattr(each, name) for each in own.values()]
        )
        return values

    return TokenTable(
        recorded=response.behaviour_logprobs.astype(np.float64),
        logprobs=pick("logprobs"), raw=pick("raw"), before=pick("before"), peak=pick("peak"),
        first=own[min(own)].logprobs, version=version, position=np.arange(count),
        changed=version != version[0], recurring=version > oldest,
        response=np.full(count, number), advantage=np.full(count, advantage),
    ).where(response.loss_mask)  # fmt: skip


def _rounding(groups: list[TrajectoryGroup], config: RunConfig, policies: _Policies) -> NDArray[np.float64]:
    """By how much bfloat16 moves the log-prob of each token before the first update, in the table's order."""
    from sapo_learner.agreement import recompute

    temperature = config.sampling.temperature
    first = min(span.version for group in groups for each in group.trajectories for span in each.spans)
    exact, rounded, moved = policies.load(first), policies.load_rounded(first), []
    for _, group, response in _responses(groups):
        chosen = response.loss_mask & (policies.weights(response) == first)
        pair = [
            recompute(policy, group.prompt_ids, response.token_ids, temperature).logprobs for policy in (rounded, exact)
        ]
        moved.append((pair[0] - pair[1])[chosen])
    return np.concatenate(moved)


# ---- figures


def _figures(
    directory: Path, config: RunConfig, groups: list[TrajectoryGroup], table: "TokenTable", policies: _Policies
) -> dict[str, Any]:
    from sapo_learner import objectives
    from sapo_learner.agreement import by_position, gates, spread, tails

    objective = objectives.build(config.objective.name, **config.objective.options)
    updated = table.where(table.updated)
    ratio = table.ratio
    return {
        "engines": sorted({group.engine for group in groups}),
        "dtype": config.policy.dtype,
        "temperature": config.sampling.temperature,
        "difference": {
            "all": spread(table.difference),
            "before the first update": spread(table.difference[~table.updated]),
            "after an update": spread(updated.difference),
            "... in responses under way": spread(updated.difference[updated.changed]),
        },
        "positions": by_position(table),
        "ratio": {"min": float(ratio.min()), "max": float(ratio.max()), "std": float(ratio.std())},
        "gate": gates(table.where(np.isfinite(table.advantage)), objective),
        "tails": [vars(each) | {"share": each.share, "probability": each.probability} for each in tails(table)],
        "drift": table.drift,
        "sync": _sync(groups, policies),
        "speed": _speed(directory, groups),
    }


def _sync(groups: list[TrajectoryGroup], policies: _Policies) -> list[dict[str, Any]]:
    """Which worker sampled how much under which version, and the digest it was verified against."""
    tokens: Counter[tuple[str, int]] = Counter()
    for group in groups:
        for response in group.trajectories:
            for span in response.spans:
                tokens[group.worker, span.version] += span.length
    return [
        {"worker": worker, "version": version, "step": policies.manifests[version].step, "tokens": count,
         "digest": policies.manifests[version].digest}
        for (worker, version), count in sorted(tokens.items())
    ]  # fmt: skip


def _speed(directory: Path, groups: list[TrajectoryGroup]) -> dict[str, Any]:
    """Tokens per second: of each worker while its engine was busy; of the learner, forward and backward."""
    sampled: Counter[str] = Counter()
    for group in groups:
        sampled[group.worker] += sum(len(each.token_ids) for each in group.trajectories)
    tokens, seconds, busy = 0, 0.0, defaultdict[str, float](float)
    for line in read(directory / "record.jsonl"):
        if line["kind"] == "busy":
            busy[line["worker"]] += sum(end - start for start, end in line["intervals"])
        elif line["kind"] == "step":
            tokens += line["tokens"]
            seconds += sum(line["seconds"].get(phase, 0.0) for phase in ("forward", "loss", "backward"))
    return {
        "engine": {worker: count / busy[worker] for worker, count in sorted(sampled.items()) if busy[worker]},
        "learner": tokens / seconds if tokens and seconds else None,
    }
