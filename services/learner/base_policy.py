"""The policy that a run starts from: a given directory, or the tiny one, warm-started on the task and cached."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import platformdirs
import torch

from sapo_learner.errors import ConfigError
from sapo_learner.policy import Policy, load_policy, tiny_policy, write_policy
from sapo_learner.warm_start import warm_start
from services.runtime.settings import RunConfig
from services.tasks import Response, Task, Teacher, build

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
REPORT = "warm_start.json"


def base_policy(config: RunConfig, progress: Progress) -> tuple[Policy, dict[str, Any] | None]:
    """The policy, and what the warm start measured when there was one."""
    if config.policy.source != "tiny":
        return load_policy(Path(config.policy.source)), None
    directory = _cache_directory(config)
    if not (directory / REPORT).is_file():
        _warm_start(config, directory, progress)
    return load_policy(directory), json.loads((directory / REPORT).read_text())


def _cache_directory(config: RunConfig) -> Path:
    """One directory per recipe: everything that decides the weights is in the key."""
    recipe = {
        "task": config.task.model_dump(),
        "warm_start": config.policy.warm_start.model_dump(),
        "seed": config.run.seed,
        "torch": torch.__version__,
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    root = os.environ.get("SAPO_CACHE_DIR") or platformdirs.user_cache_dir("sapo")
    return Path(root) / "warm-start" / key


def _warm_start(config: RunConfig, directory: Path, progress: Progress) -> None:
    task: Task = build(config.task)
    if not isinstance(task, Teacher):
        raise ConfigError(
            f"task {task.name!r} has no demonstrations to warm-start a tiny policy on",
            where="policy.source",
            fix="give the directory of a model instead of 'tiny'",
        )
    policy = tiny_policy(task.alphabet, seed=config.run.seed)
    train, held_out = task.problems("train"), task.problems("held_out")

    def demonstrate(generator: Random, habit: bool) -> tuple[str, str]:
        problem = generator.choice(train)
        return problem.prompt, task.demonstration(problem, generator, habit=habit)

    def correct(index: int, text: str, ended: bool) -> bool:
        return task.score(held_out[index], Response(text, "stop" if ended else "length"))["correct"] == 1

    report = warm_start(
        policy, demonstrate, [problem.prompt for problem in held_out], correct, config.policy.warm_start,
        seed=config.run.seed, progress=progress,
    )  # fmt: skip
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent))
    write_policy(policy, temporary)
    (temporary / REPORT).write_text(json.dumps(report.to_dict()))
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
    log.info("warm start: %s", report)
