"""Engines and commands take the model once when they read it, measured in processes of their own; see also
tests/sapo_learner/test_policy_memory.py."""

from pathlib import Path

from sapo_learner import checkpoint
from sapo_learner.policy import write_policy
from sapo_learner.snapshot import write_snapshot
from services.runtime.settings import dump_config
from tests.sapo_learner.test_policy_memory import large_policy, linux, peak
from tests.small_run import run_config


@linux
def test_the_torch_engine_starts_and_follows_with_one_model_and_one_tensor(tmp_path: Path) -> None:
    """Measured: 1.13; 2.10 where a snapshot is mapped as a whole."""
    policy = large_policy()
    write_policy(policy, tmp_path / "written")
    files = {path.name: path.read_bytes() for path in (tmp_path / "written").glob("*.json")}
    manifest = write_snapshot(
        policy.tensors(), step=0, dtype="float32", files=files, directory=tmp_path / "scratch" / "blobs"
    )
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    prepare = f"""
import asyncio
from sapo_learner.manifest import Manifest
from services.rollout.engines import PolicyVersion
from services.rollout.engines.starting import start_engine
from services.rollout.follower import PolicyStore
from tests.small_run import run_config
config, store = run_config(directory), PolicyStore(None, Path({str(tmp_path / "scratch")!r}))
manifest = Manifest.from_json((directory / "manifest.json").read_text())
"""
    load = """
async def start():
    started = await start_engine(config, store, manifest, PolicyVersion(0, 0))
    await started.engine.update_weights(await asyncio.to_thread(store.tensors, manifest), PolicyVersion(1, 1))
    assert started.engine.policy_version == PolicyVersion(1, 1)
    await started.engine.close()
    return started.engine._decoder.policy
loaded = asyncio.run(start())
"""
    assert peak(load, tmp_path, prepare=prepare) < 1.3


@linux
def test_commands_read_a_runs_checkpoint_into_one_model(tmp_path: Path) -> None:
    """As `sapo eval`, `sample` and `export` do. Measured: 1.13; 2.05 where the checkpoint is mapped as a whole."""
    policy = large_policy()
    write_policy(policy, tmp_path / "model")
    (tmp_path / "run.yaml").write_text(dump_config(run_config(tmp_path, policy={"source": str(tmp_path / "model")})))
    weights = dict(policy.tensors())
    moments = {f"{name}/exp_avg": each.clone() for name, each in weights.items()}
    state = checkpoint.CheckpointState(4, 4, "", {}, weights, moments, {})
    checkpoint.save(tmp_path / "checkpoints", state, token=1)
    prepare = "import asyncio; from services.run_directory import load_any_policy; import services.learner.base_policy"
    assert peak("loaded, _ = asyncio.run(load_any_policy(str(directory)))", tmp_path, prepare=prepare) < 1.3
