"""Publishing beside training: the newest waits, those between are skipped, what is published is what was trained."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sapo_learner.errors import Corrupt, Fenced
from sapo_learner.manifest import Blob, Manifest
from sapo_learner.policy import Policy, load_policy, load_weights, tiny_policy, write_policy
from sapo_learner.probe import draw_sequence, measure, sequence_logprobs
from sapo_learner.snapshot import read_snapshot, weights_digest
from services.learner.publisher import Publisher, copy_weights
from services.runtime import api
from services.runtime.metrics import LearnerMetrics
from tests.recorded import ALPHABET


class ControlPlane:
    """Keeps blobs and manifests; `gate` holds each registration back until it is opened."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.published: list[api.PublishRequest] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.arrived = asyncio.Event()
        self.holds = 0  # so many times a policy is held back first

    async def upload(self, path: Path, blob: Blob) -> None:
        (self.directory / blob.sha256).write_bytes(path.read_bytes())

    async def publish(self, request: api.PublishRequest) -> api.PublishResponse:
        self.arrived.set()
        await self.gate.wait()
        if self.holds:
            self.holds -= 1
            return api.PublishResponse(held_for="an evaluation")
        self.published.append(request)
        return api.PublishResponse(version=len(self.published) - 1, changed=True)


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    write_policy(tiny_policy(ALPHABET, seed=0), tmp_path / "base")
    return load_policy(tmp_path / "base")


@pytest.fixture
def control(tmp_path: Path) -> ControlPlane:
    (tmp_path / "blobs").mkdir()
    return ControlPlane(tmp_path / "blobs")


@pytest.fixture
def publisher(tmp_path: Path, policy: Policy, control: ControlPlane) -> Publisher:
    return Publisher(
        control, policy, dtype="float32", staging=tmp_path / "staging", token=7, metrics=LearnerMetrics()  # type: ignore[arg-type]
    )  # fmt: skip


async def test_a_policy_that_is_held_back_is_asked_for_again(
    publisher: Publisher, control: ControlPlane, policy: Policy
) -> None:
    control.holds = 3
    assert (await publisher.publish(copy_weights(policy, 1))).version == 0
    assert [request.manifest["step"] for request in control.published] == [1]


async def test_what_is_published_is_the_weights_at_that_step(
    publisher: Publisher, control: ControlPlane, policy: Policy
) -> None:
    snapshot = copy_weights(policy, 3)
    digest = weights_digest(policy.tensors())
    with torch.no_grad():
        policy.head_weight.add_(1.0)  # training goes on
    manifest = await publisher.publish(snapshot)
    assert (manifest.step, manifest.version) == (3, 0)
    assert weights_digest(read_snapshot(manifest, lambda sha256: control.directory / sha256)) == digest
    request = control.published[0]
    assert request.token == 7
    assert request.facts == {
        "vocabulary": str(policy.vocabulary),
        "context": "256",
        "model_digest": manifest.model_digest,
        "tokenizer_digest": manifest.tokenizer_digest,
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_I4_the_probe_in_the_manifest_is_what_the_published_weights_give(
    control: ControlPlane, policy: Policy, tmp_path: Path, dtype: str
) -> None:
    publisher = Publisher(
        control, policy, dtype=dtype, staging=tmp_path / "staging", token=7, metrics=LearnerMetrics()  # type: ignore[arg-type]
    )  # fmt: skip
    plain = await publisher.publish(copy_weights(policy, 3))
    copied = copy_weights(policy, 3, dtype)
    probe = measure(policy, copied.tensors, draw_sequence(policy, seed=3))
    await publisher.publish(replace(copied, probe=probe))
    manifest = Manifest.from_json(json.dumps(control.published[-1].manifest))
    assert manifest.probe == probe
    assert manifest.digest == plain.digest  # rounding early makes no other policy, and a probe is no part of it
    assert plain.probe is None
    served = load_policy(tmp_path / "base", weights=False)
    load_weights(served, read_snapshot(manifest, lambda sha256: control.directory / sha256))
    assert sequence_logprobs(served, probe.token_ids[:1], probe.token_ids[1:]).tolist() == pytest.approx(
        probe.logprobs, abs=1e-6
    )


async def test_the_newest_waits_and_those_between_are_skipped(
    publisher: Publisher, control: ControlPlane, policy: Policy
) -> None:
    task = asyncio.create_task(publisher.run())
    control.gate.clear()
    publisher.submit(copy_weights(policy, 1))
    await asyncio.wait_for(control.arrived.wait(), 10)
    for step in (2, 3, 4):
        publisher.submit(copy_weights(policy, step))
    control.gate.set()
    await asyncio.wait_for(publisher.drain(), 10)
    task.cancel()
    assert [request.manifest["step"] for request in control.published] == [1, 4]


async def test_weights_that_are_not_finite_are_never_published(
    publisher: Publisher, control: ControlPlane, policy: Policy
) -> None:
    with torch.no_grad():
        policy.head_weight[0, 0] = float("nan")
    with pytest.raises(Corrupt):
        await publisher.publish(copy_weights(policy, 1))
    assert control.published == []


async def test_staging_holds_no_weights_afterwards(publisher: Publisher, policy: Policy, tmp_path: Path) -> None:
    for step in range(3):
        with torch.no_grad():
            policy.head_weight.add_(0.1)
        manifest = await publisher.publish(copy_weights(policy, step))
        assert not any(list((tmp_path / "staging").rglob(part.sha256)) for part in manifest.parts)


async def test_I7_a_learner_that_wakes_beside_a_newer_one_neither_harms_it_nor_dies_of_a_missing_file(
    publisher: Publisher, control: ControlPlane, policy: Policy, tmp_path: Path
) -> None:
    newer = Publisher(
        control, policy, dtype="float32", staging=tmp_path / "staging", token=8, metrics=LearnerMetrics()  # type: ignore[arg-type]
    )  # fmt: skip
    older_upload, newer_upload = publisher._upload, newer._upload

    async def overtaken(manifest: Manifest) -> None:
        async def disturbed(manifest: Manifest) -> None:
            publisher._empty_staging()
            await newer_upload(manifest)

        newer._upload = disturbed  # type: ignore[method-assign]
        assert (await newer.publish(copy_weights(policy, 2))).version == 0
        await older_upload(manifest)

    publisher._upload = overtaken  # type: ignore[method-assign]
    with pytest.raises(Fenced, match="newer learner"):
        await publisher.publish(copy_weights(policy, 1))
    assert [request.manifest["step"] for request in control.published] == [2]
