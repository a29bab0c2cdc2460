"""A starting worker waits for the first policy, and takes it only when it verifies."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from sapo_learner.errors import ConfigError, Corrupt, Mismatch, NotFound, SapoError
from sapo_learner.manifest import Manifest
from sapo_learner.policy import Policy, load_policy, tiny_policy, write_policy
from sapo_learner.snapshot import read_snapshot, write_snapshot
from services.rollout.engines import PolicyVersion
from services.rollout.engines.torch_engine import TorchEngine
from services.rollout.service import FIRST_POLICY_TRIES, _first_policy, _scratch
from services.runstore import EmbeddedRedis
from services.runtime.lifecycle import Lifecycle
from services.status_report import lines
from tests.small_run import lease_request, run_config
from tests.system import jsonl_run, system


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

    def write_model_directory(self, _: Manifest, *, weights: bool) -> Path:
        return self._directory / "model"

    def tensors(self, manifest: Manifest) -> dict[str, torch.Tensor]:
        return read_snapshot(manifest, lambda sha256: self._directory / "blobs" / sha256)


async def first(lifecycle: Lifecycle, store: Any) -> dict[str, torch.Tensor] | None:
    """What the engine serves."""
    found = await _first_policy(lifecycle, run_config(Path("unused")), store)
    if found is None:
        return None
    manifest, started = found
    assert started.engine.policy_version == PolicyVersion(manifest.version or 0, manifest.step)
    assert isinstance(started.engine, TorchEngine)
    await started.engine.close()
    return started.engine._decoder.policy.tensors()


async def test_the_first_policy_is_waited_for_and_damaged_copies_are_fetched_anew(tmp_path: Path) -> None:
    lifecycle = Impatient()
    store = Store(tmp_path, [NotFound("nothing yet"), Mismatch("damaged"), NotFound("superseded")])
    found = await first(lifecycle, store)
    assert found is not None
    assert all(torch.equal(tensor, store.policy.tensors()[name]) for name, tensor in found.items())
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


async def test_what_a_killed_worker_held_is_sampled_by_the_next_of_its_name_at_once(
    tmp_path: Path, redis: EmbeddedRedis
) -> None:
    config = jsonl_run(tmp_path, 4, "1")
    endless = {"lease_seconds": 3600, "max_lease_seconds": 3600}
    config = config.model_copy(update={"pacing": config.pacing.model_copy(update=endless)})
    async with system(config, redis.url, workers=0) as running:
        held = 0
        while not held:
            held = len((await running.control.lease(lease_request("rollout-0", count=4, wait_seconds=1))).draws)
        running.start_worker("rollout-0")
        status = await running.finished()
    assert status["accepted"] == config.training.steps * config.training.groups_per_step


# ---- the probe, in the whole system


class DifferentEngine(TorchEngine):
    """Computes something else than was published, by a thousandth at one token."""

    async def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        first, *rest = await super().score(prompt_ids, token_ids)
        return [first + 1e-3, *rest]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_I4_every_version_is_proved_and_the_figures_are_told(
    tmp_path: Path, redis: EmbeddedRedis, dtype: str
) -> None:
    """bfloat16 policies, too, within the bound of float32: that is what the small engine and the learner compute in."""
    config = jsonl_run(tmp_path, 4, "1")
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"dtype": dtype})})
    async with system(config, redis.url) as running:
        await running.finished()
        manifest = await running.control.manifest()
        assert manifest.dtype == dtype
        assert manifest.probe is not None
        while (status := await running.control.status())["workers"][0]["version"] != manifest.version:
            await asyncio.sleep(0.05)
        figures = status["workers"][0]["probe"]
    assert 0 < figures["mean"] <= figures["max"] < 1e-4
    (line,) = (line for line in lines(status) if line.startswith("rollout-0: "))
    assert f"within {figures['max']:.1e} nats of the learner" in line


async def test_I4_a_worker_whose_engine_computes_something_else_samples_nothing(
    tmp_path: Path, redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.rollout.engines.starting.TorchEngine", DifferentEngine)
    async with system(jsonl_run(tmp_path, 4, "1"), redis.url) as running:
        with pytest.raises(Corrupt, match="version 0 as it was learned"):
            await asyncio.wait_for(running.tasks["rollout-0"], 30)
        status = await running.control.status()
        async with httpx.AsyncClient() as client:
            metrics = (await client.get(f"{running.control.url}/metrics")).text
    assert (status["accepted"], status["open_leases"], status["workers"]) == (0, 0, [])
    assert "sapo_worker_probe_misses_total 1.0" in metrics, "its own metrics have ended with it"
