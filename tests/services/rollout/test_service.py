"""A starting worker waits for the first policy, and takes it only when it verifies."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sapo_learner.errors import ConfigError, Mismatch, NotFound, SapoError
from sapo_learner.manifest import Manifest
from sapo_learner.policy import Policy, load_policy, tiny_policy, write_policy
from sapo_learner.snapshot import read_snapshot, write_snapshot
from services.rollout.service import FIRST_POLICY_TRIES, _first_policy, _scratch
from services.runtime.lifecycle import Lifecycle


class Impatient(Lifecycle):
    """Does not sleep."""

    async def sleep(self, seconds: float) -> bool:
        return self.stopping.is_set()


class Store:
    """A published policy on disk; `fails`: what the next tries to fetch it raise."""

    def __init__(self, directory: Path, fails: list[SapoError]) -> None:
        self._directory, self.fails = directory, fails
        write_policy(tiny_policy("0123", seed=3), directory / "model")
        self.policy: Policy = load_policy(directory / "model")
        made = write_snapshot(
            self.policy.tensors(), step=0, dtype="float32", files=self.policy.files, directory=directory / "blobs"
        )
        self.manifest = made.model_copy(update={"version": 0})

    async def fetch(self) -> Manifest:
        if self.fails:
            raise self.fails.pop(0)
        return self.manifest

    def write_model_directory(self, _: Manifest) -> Path:
        return self._directory / "model"

    def tensors(self, manifest: Manifest) -> dict[str, torch.Tensor]:
        return read_snapshot(manifest, lambda sha256: self._directory / "blobs" / sha256)


async def first(lifecycle: Lifecycle, store: Any) -> tuple[Manifest, Policy] | None:
    return await _first_policy(lifecycle, store)


async def test_the_first_policy_is_waited_for_and_damaged_copies_are_fetched_anew(tmp_path: Path) -> None:
    lifecycle = Impatient()
    store = Store(tmp_path, [NotFound("nothing yet"), Mismatch("damaged"), NotFound("superseded")])
    found = await first(lifecycle, store)
    assert found is not None
    manifest, policy = found
    assert manifest.version == 0
    assert all(torch.equal(tensor, store.policy.tensors()[name]) for name, tensor in policy.tensors().items())
    assert lifecycle.waiting_for == ["the learner's first policy"]


async def test_a_policy_that_never_verifies_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(Mismatch, match="damaged"):
        await first(Impatient(), Store(tmp_path, [Mismatch("damaged")] * FIRST_POLICY_TRIES))


async def test_a_worker_that_is_asked_to_stop_does_not_wait(tmp_path: Path) -> None:
    lifecycle = Impatient()
    lifecycle.stopping.set()
    assert await first(lifecycle, Store(tmp_path, [NotFound("nothing yet")] * 2)) is None


def test_a_second_worker_of_one_name_on_one_machine_is_refused_and_disturbs_nobody() -> None:
    with _scratch("http://somewhere twin") as first:
        (first / "blob").write_text("weights")
        with pytest.raises(ConfigError, match="a worker of this name runs here"), _scratch("http://somewhere twin"):
            pass
        assert (first / "blob").read_text() == "weights"
    with _scratch("http://somewhere twin") as again:
        assert not list(again.iterdir())
