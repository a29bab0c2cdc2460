"""The base policy: made once per recipe, then read from the cache; a directory is taken as it is."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from sapo_learner.config import parse
from sapo_learner.errors import ConfigError
from sapo_learner.policy import Policy, tiny_policy, write_policy
from sapo_learner.snapshot import weights_digest
from services.learner import base_policy as module
from services.learner.base_policy import base_policy
from services.runtime.settings import RunConfig
from services.tasks import Prompt, Response, Split, build
from tests.recorded import ALPHABET

SAMPLES = 10
QUICK = {"clean_steps": 2, "habit_steps": 1, "samples": SAMPLES, "batch": 4}


class Lenient:
    """A task that finds everything right in the first measurement and nothing in the second: two quick phases."""

    name, alphabet = "lenient", ALPHABET

    def __init__(self) -> None:
        self.scored = 0

    def model_dump(self, *, mode: str) -> dict[str, object]:
        return {}

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return [Prompt(id=f"{split}-{index}", content=f"{index}+1=", answer="1") for index in range(5)]

    def score(self, prompt: Prompt, response: Response) -> dict[str, float]:
        self.scored += 1
        return {"correct": float(self.scored <= SAMPLES)}

    def demonstration(self, prompt: Prompt, generator: random.Random, *, habit: bool) -> str:
        return ">2" if habit else "(1)>1"

    def reply(self, prompt: Prompt, turns: Sequence[str]) -> str | None:
        return None


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Lenient]:
    """Every task that was built, with the cache in an empty directory."""
    built: list[Lenient] = []
    monkeypatch.setenv("SAPO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "build", lambda settings: built.append(Lenient()) or built[-1])
    return built


def config(seed: int = 0, **policy: object) -> RunConfig:
    return parse(RunConfig, {"run": {"seed": seed}, "policy": {"warm_start": QUICK, **policy}}, where="test")


def measured(tasks: list[Lenient]) -> int:
    """Warm starts."""
    return sum(each.scored > 0 for each in tasks)


def quiet(phase: str, step: int, limit: int) -> None: ...


def test_the_warm_start_runs_once_per_recipe(tasks: list[Lenient]) -> None:
    first, report = base_policy(config(), quiet)
    again, same_report = base_policy(config(), quiet)
    assert measured(tasks) == 1
    assert report == same_report
    assert report is not None
    assert report["ceiling"]["mean"] == 1.0
    assert weights_digest(first.tensors()) == weights_digest(again.tensors())
    other, _ = base_policy(config(seed=1), quiet)
    assert measured(tasks) == 2
    assert weights_digest(other.tensors()) != weights_digest(first.tensors())


def test_a_default_that_is_written_out_makes_no_other_recipe() -> None:
    """`sapo config` writes all of them out."""
    short, full, other = (
        RunConfig.model_validate({"task": {"name": "arithmetic", **options}})
        for options in ({}, {"held_out_every": 10}, {"held_out_every": 5})
    )
    keys = [module._cache_directory(each, build(each.task)) for each in (short, full, other)]
    assert keys[0] == keys[1] != keys[2]


def test_a_warm_start_that_was_killed_is_made_again(tasks: list[Lenient], tmp_path: Path) -> None:
    base_policy(config(), quiet)
    (report,) = (tmp_path / "cache").rglob(module.REPORT)
    report.unlink()
    base_policy(config(), quiet)
    assert measured(tasks) == 2
    assert report.exists()


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    policy = tiny_policy(ALPHABET, seed=5)
    write_policy(policy, tmp_path / "model")
    loaded, report = base_policy(config(source=str(tmp_path / "model")), quiet)
    assert report is None
    assert weights_digest(loaded.tensors()) == weights_digest(policy.tensors())


def test_a_directory_that_is_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        base_policy(config(source=str(tmp_path)), quiet)


def test_of_two_runs_that_begin_at_once_the_quicker_one_s_is_kept(
    tasks: list[Lenient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be reading it while the other one comes to its end."""
    write, files = module.write_policy, list[int]()

    def overtaken(policy: Policy, directory: Path) -> None:
        monkeypatch.setattr(module, "write_policy", write)
        base_policy(config(), quiet)
        files.extend(inodes())
        write(policy, directory)

    def inodes() -> list[int]:
        return sorted(path.stat().st_ino for path in (tmp_path / "cache").rglob("*") if path.is_file())

    monkeypatch.setattr(module, "write_policy", overtaken)
    base_policy(config(), quiet)
    assert len(tasks) == 2, "each has made one"
    assert files
    assert inodes() == files
