"""I8 over processes: ranks under gloo make the steps that one process makes. One torchrun per number of ranks.

Two ranks share one copy of the weights; four are two pairs with a copy each (hybrid sharding).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sapo_learner import checkpoint
from sapo_learner.config import ParallelSettings
from sapo_learner.errors import ConfigError
from sapo_learner.hidden_states import packs
from sapo_learner.parallel import ALONE, Ranks
from sapo_learner.resume import restore
from sapo_learner.sharding import mesh_of, sharded
from tests.sapo_learner import ranked_models
from tests.sapo_learner.ranked_models import DTYPES, HALF, MODELS, STEPS
from tests.sapo_learner.ranked_steps import cases
from tests.sapo_learner.recorded_steps import EPSILON

LIMIT = 240  # seconds
pytestmark = pytest.mark.timeout(LIMIT + 60)
NOT_APPLIED = {"all dropped", "not finite", "no signal"}
Results = list[dict[str, Any]]


World = tuple[Path, Results]
"""Where the ranks left their checkpoints, and what each of them found."""


def launched(directory: Path, size: int) -> World:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    process = subprocess.Popen(
        [*command, "-m", "tests.sapo_learner.ranked_steps", str(directory)],
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, output[-5000:]
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)  # torchrun gives each a session of its own
            for each in (process, *family):
                each.kill()
            process.wait()
    return directory, [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> World:
    return launched(tmp_path_factory.mktemp("two-ranks"), 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> World:
    return launched(tmp_path_factory.mktemp("four-ranks"), 4)


@pytest.fixture(params=["two", "four"])
def world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def ranks(two: World) -> Results:
    """Two ranks, which make steps under every objective and filter."""
    return two[1]


WHOLE = [f"{kind} {dtype}" for kind in MODELS for dtype in DTYPES]


@pytest.mark.parametrize("name", WHOLE)
def test_i8_the_first_gradient_and_ten_steps_of_adamw_are_those_of_one_rank(world: World, name: str) -> None:
    exact = name.endswith("float64")
    for each in world[1]:
        found = each["models"][name]
        assert found["gradient"] <= (EPSILON if exact else 1e-5)
        assert found["weights"] <= (1e-8 if exact else 5e-5)
        assert found["moved"] > 1e-3


@pytest.mark.parametrize("name", WHOLE)
def test_a_checkpoint_of_one_rank_is_resumed_by_several(world: World, name: str) -> None:
    for each in world[1]:
        assert each["models"][name]["resumed from one"] <= (1e-8 if name.endswith("float64") else 5e-5)
        assert each["models"][name]["resumed from several"] == 0, "the same ranks go on to the same bits"


@pytest.mark.parametrize("kind", MODELS)
def test_a_checkpoint_of_several_ranks_is_resumed_by_one(world: World, kind: str) -> None:
    dtype = torch.float64
    learner = ranked_models.learner_of(kind, dtype, ALONE, ParallelSettings(), seed=7)
    loaded = checkpoint.load_newest(world[0] / f"{kind}-float64" / "from-several")
    restore(learner, loaded.state, where="test")
    assert learner.step_count == HALF
    found = ranked_models.advance(learner, HALF, STEPS)
    truth = ranked_models.advance(ranked_models.learner_of(kind, dtype, ALONE, ParallelSettings()), 0, STEPS)
    assert ranked_models.difference(found, truth) <= 1e-8


def test_a_damaged_shard_is_named(world: World) -> None:
    directory = world[0] / "moe-float32" / "from-several"
    path = next(checkpoint.list_whole(directory)[0].path.glob("shards/__1_*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(checkpoint.Corrupt, match=path.name):
        checkpoint.load_newest(directory)


def test_layers_that_are_computed_again_give_the_same_gradient(world: World) -> None:
    assert all(each["models"]["activation checkpointing"] <= EPSILON for each in world[1])


@pytest.mark.parametrize("step", ["all work", "recomputed", "one is idle"])
def test_experts_are_reported_as_busy_as_one_rank_reports_them(world: World, step: str) -> None:
    for each in world[1]:
        alone, shared = each["models"]["router load"][step]
        assert shared == alone
        assert set(shared) == {"router_load_max", "router_load_cv", "router_idle_experts"}


def test_in_bfloat16_the_weights_and_moments_stay_float32(world: World) -> None:
    for each in world[1]:
        found = each["models"]["bfloat16"]
        assert found["dtypes"] == found["moments"] == ["torch.float32"]
        assert found["cosine"] > 0.99
        assert not found["equal"], "nothing was computed in bfloat16"


@pytest.mark.parametrize("what", ["only on rank 0", "rounded", "inside", "restored"])
def test_a_snapshot_is_gathered_in_its_dtype_on_rank_0(world: World, what: str) -> None:
    assert all(each["models"]["snapshot"][what] for each in world[1])


def test_checkpoints_of_another_model_are_refused_on_every_rank(world: World) -> None:
    for each in world[1]:
        assert set(each["models"]["another model"]) == {"from-one", "from-several"}
        assert all("lm_head.weight" in said for said in each["models"]["another model"].values())


def test_ranks_that_cannot_share_copies_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.shard: 4 ranks .* 3 by 3.* 1, 2, 4"):
        mesh_of(Ranks(0, 4), ParallelSettings(shard=3), torch.device("cpu"))


def test_a_model_that_cannot_have_packed_rows_is_refused_for_several_ranks() -> None:
    policy = ranked_models.model_policy("dense", torch.float32)
    policy.model.set_attn_implementation("sdpa")
    assert not packs(policy)
    with pytest.raises(ConfigError, match=r"policy\.source: .* packed rows .*parallel\.processes"):
        sharded(policy, Ranks(0, 2), ParallelSettings(), torch.device("cpu"), None)


@pytest.mark.parametrize("name", cases())
def test_i8_two_ranks_make_the_step_of_one(ranks: Results, name: str) -> None:
    first, second = (each["cases"][name] for each in ranks)
    assert first["digest"] == second["digest"], "the ranks' weights are no longer the same"
    assert first["report"] == second["report"] == first["report_alone"]
    assert first["unused"] == [1, 1, 1], "a parameter without gradient was moved, by weight decay"
    if name in NOT_APPLIED:
        assert not first["applied"]
    else:
        assert first["applied"]
        assert first["norm"] > 0
        assert first["difference"] <= EPSILON * first["norm"]


def test_with_one_microbatch_a_rank_is_idle_and_takes_part(ranks: Results) -> None:
    assert [each["cases"]["one microbatch"]["microbatches"] for each in ranks] == [[0], [None]]
    assert all(None not in each["cases"]["sapo-none"]["microbatches"][:1] for each in ranks)


def test_what_is_not_finite_on_one_rank_is_refused_on_every_rank_for_the_same_reason(ranks: Results) -> None:
    refusals = [each["cases"]["not finite"]["refusal"] for each in ranks]
    assert re.search(r"not finite", refusals[0])
    assert refusals[0] == refusals[1]


def test_one_rank_s_disk_stops_all_of_them_at_the_same_place(world: World) -> None:
    _, results = world
    for each in (result["one rank's disk"] for result in results):
        assert "No such file or directory" in each["refused"]
        assert each["then"] == list(range(len(results)))


def test_torchrun_leaves_no_process_behind(world: World) -> None:
    assert {each["size"] for each in world[1]} == {len(world[1])}
    assert not any(psutil.pid_exists(each["pid"]) for each in world[1])


# ---- Who takes what


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([], [[], []]),
        ([5], [[0], [None]]),
        ([4, 4, 4, 4], [[0, 2], [1, 3]]),
        ([10, 3, 3, 3], [[0, 3], [1, 2]]),
        ([1, 1, 9], [[2, None], [0, 1]]),
    ],
)
def test_microbatches_are_shared_out_by_tokens_as_many_to_each(
    costs: list[int], expected: list[list[int | None]]
) -> None:
    assert Ranks(0, 2).shares(costs) == Ranks(1, 2).shares(costs) == expected


def test_every_microbatch_has_exactly_one_owner() -> None:
    costs = torch.randint(1, 100, (37,), generator=torch.Generator().manual_seed(0)).tolist()
    owned = Ranks(0, 5).shares(costs)
    assert {len(each) for each in owned} == {8}
    taken = [[index for index in each if index is not None] for each in owned]
    assert sorted(index for each in taken for index in each) == list(range(37))
    loads = [sum(costs[index] for index in each) for each in taken]
    assert max(loads) - min(loads) <= max(costs)


def test_a_process_alone_exchanges_nothing() -> None:
    parts = {1: {"a": torch.ones(2)}, 0: {"a": torch.zeros(3)}}
    assert list(Ranks().gathered(parts)) == [0, 1]
    assert Ranks().said("a") == ["a"]
    assert Ranks().agreed("a") == "a"
