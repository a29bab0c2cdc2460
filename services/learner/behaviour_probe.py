"""Is the recorded behaviour log-prob the truth (I4)? Recompute a group's from the stored snapshots of its versions.

Everything goes the long way round: manifests and blobs as the control plane serves them, digests verified, the
learner's own log-prob path, one pass per version, each token compared under the version that its span names.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sapo_learner.manifest import Manifest
from sapo_learner.policy import Policy, load_weights
from sapo_learner.probe import sequence_logprobs
from sapo_learner.snapshot import read_snapshot
from sapo_learner.trajectory import TrajectoryGroup
from services.runtime.client import ControlPlaneClient


@dataclass(frozen=True)
class ProbeReport:
    """Differences in nats, over the tokens that the policy sampled."""

    step: int
    max_abs_diff: float
    mean_abs_diff: float
    tokens: int
    mixed_version_responses: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


class BehaviourProbe:
    def __init__(self, control: ControlPlaneClient, spare: Policy, scratch: Path) -> None:
        """spare: a second copy of the model, whose weights the probe overwrites. scratch: this learner's own."""
        self._control, self._spare, self._scratch = control, spare, scratch
        scratch.mkdir(parents=True, exist_ok=True)

    async def check(self, step: int, groups: Sequence[TrajectoryGroup]) -> ProbeReport:
        """Compare one group, with responses of mixed versions if there is one. Raises NotFound for a pruned version."""
        group = max(groups, key=lambda each: sum(len(response.spans) > 1 for response in each.trajectories))
        versions = sorted({span.version for each in group.trajectories for span in each.spans})
        manifests = {version: await self._control.manifest(version) for version in versions}
        for manifest in manifests.values():
            for part in manifest.parts:
                await self._control.download(part, self._scratch)
        try:
            return await asyncio.to_thread(self._compare, step, group, manifests)
        finally:
            for path in self._scratch.iterdir():
                path.unlink()

    def _compare(self, step: int, group: TrajectoryGroup, manifests: dict[int, Manifest]) -> ProbeReport:
        differences: list[NDArray[np.float64]] = []
        for version, manifest in manifests.items():
            load_weights(self._spare, read_snapshot(manifest, lambda sha256: self._scratch / sha256))
            for response in group.trajectories:
                chosen = response.loss_mask & (response.token_versions() == version)
                recomputed = sequence_logprobs(
                    self._spare, group.prompt_ids.tolist(), response.token_ids.tolist(), group.sampling.temperature
                )
                differences.append(np.abs(recomputed - response.behaviour_logprobs)[chosen].astype(np.float64))
        values = np.concatenate(differences)
        mixed = sum(len(response.spans) > 1 for response in group.trajectories)
        return ProbeReport(step, float(values.max()), float(values.mean()), len(values), mixed)
