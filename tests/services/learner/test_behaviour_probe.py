"""I4: the probe agrees with honest records and finds dishonest ones, mixed versions included."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sapo_learner.manifest import Blob, Manifest
from sapo_learner.policy import Policy, load_policy, load_weights, tiny_policy, write_policy
from sapo_learner.snapshot import write_snapshot
from sapo_learner.trajectory import TrajectoryGroup
from services.learner.behaviour_probe import BehaviourProbe
from services.rollout.engines import PolicyVersion, Sampled, SampleRequest
from services.rollout.engines.torch_engine import TorchEngine
from tests.recorded import ALPHABET, group, response


class ControlPlane:
    """Two published versions on disk."""

    def __init__(self, directory: Path, base: Policy) -> None:
        self.directory, self.manifests = directory, dict[int, Manifest]()
        self.tensors = []
        for version in (0, 1):
            generator = torch.Generator().manual_seed(version)
            tensors = {
                name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
                for name, tensor in base.tensors().items()
            }
            self.tensors.append(tensors)
            manifest = write_snapshot(tensors, step=version, dtype="float32", files=base.files, directory=directory)
            self.manifests[version] = manifest.model_copy(update={"version": version})

    async def manifest(self, version: int) -> Manifest:
        return self.manifests[version]

    async def download(self, blob: Blob, directory: Path) -> Path:
        return Path(shutil.copy(self.directory / blob.sha256, directory / blob.sha256))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_policy(tiny_policy(ALPHABET, seed=0), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def control(tmp_path: Path, base: Path) -> ControlPlane:
    return ControlPlane(tmp_path / "blobs", load_policy(base))


@pytest.fixture
def probe(tmp_path: Path, base: Path, control: ControlPlane) -> BehaviourProbe:
    return BehaviourProbe(control, load_policy(base), tmp_path / "scratch")  # type: ignore[arg-type]


async def sampled(control: ControlPlane, base: Path, temperature: float) -> TrajectoryGroup:
    """A group from the real engine, whose weights change in the middle of its responses."""
    policy = load_policy(base)
    load_weights(policy, control.tensors[0])
    engine = TorchEngine(policy, PolicyVersion(0, 0), slots=4)
    prompt = policy.tokenizer.encode("7+5-3=")

    responses = []
    for index in range(2):
        generation = engine.generate(SampleRequest(str(index), prompt, index, 80, temperature))
        one = Sampled()
        one.add(await anext(generation))
        await engine.update_weights(control.tensors[1 - index], PolicyVersion(1 - index, 1 - index))
        async for delta in generation:
            one.add(delta)
        responses.append(one)
    await engine.close()
    return group(
        [
            replace(
                response(each.token_ids, logprobs=each.logprobs, finish_reason=each.finish_reason, reward=float(index)),
                spans=tuple(each.spans),
            )
            for index, each in enumerate(responses)
        ],
        prompt_ids=prompt,
        temperature=temperature,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_honest_records_agree_within_float32_noise(
    probe: BehaviourProbe, control: ControlPlane, base: Path, temperature: float
) -> None:
    recorded = await sampled(control, base, temperature)
    report = await probe.check(5, [recorded])
    assert report.max_abs_diff < 1e-4
    assert report.tokens == sum(len(each.token_ids) for each in recorded.trajectories)
    assert report.mixed_version_responses == sum(len(each.spans) > 1 for each in recorded.trajectories) > 0


async def test_a_log_prob_of_another_policy_or_temperature_is_found(
    probe: BehaviourProbe, control: ControlPlane, base: Path
) -> None:
    recorded = await sampled(control, base, 1.0)
    first = recorded.trajectories[0]
    wrong_version = replace(first, spans=tuple(replace(span, version=1 - span.version) for span in first.spans))
    assert (await probe.check(5, [replace(recorded, trajectories=(wrong_version,))])).max_abs_diff > 1e-3
    wrong_temperature = replace(recorded, sampling=replace(recorded.sampling, temperature=0.9))
    assert (await probe.check(5, [wrong_temperature])).max_abs_diff > 1e-3
    changed = np.array(first.behaviour_logprobs)
    changed[0] -= 0.001
    one_token = replace(recorded, trajectories=(replace(first, behaviour_logprobs=changed),))
    assert (await probe.check(5, [one_token])).max_abs_diff == pytest.approx(0.001, abs=1e-4)


async def test_nothing_is_left_in_the_scratch_directory(
    probe: BehaviourProbe, control: ControlPlane, base: Path, tmp_path: Path
) -> None:
    await probe.check(5, [await sampled(control, base, 1.0)])
    assert list((tmp_path / "scratch").iterdir()) == []
