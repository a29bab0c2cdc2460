"""The policy that a run starts from: a given directory, or the tiny one, warm-started on the task and cached."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import platformdirs
import torch

from sapo_learner.errors import ConfigError
from sapo_learner.policy import Policy, load_policy, tiny_policy, write_policy
from sapo_learner.warm_start import warm_start
from services import hub
from services.runtime.settings import RunConfig
from services.tasks import END_OF_TURN, Response, Task, Teacher, build

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
REPORT = "warm_start.json"


def base_policy(
    config: RunConfig, progress: Progress, say: Callable[[str], None] = lambda _: None
) -> tuple[Policy, dict[str, Any] | None]:
    """The policy, with fresh adapters if it has some, and what the warm start measured when there was one.

    say: told how far a download is.
    """
    policy, report = _whole(config, progress, say)
    if config.policy.lora is None:
        return policy, report
    from sapo_learner.lora import add_lora  # peft takes seconds to import

    source = "@".join(filter(None, (config.policy.source, config.policy.revision)))
    return add_lora(policy, config.policy.lora, seed=config.run.seed, source=source), report


def shaped_policy(directory: Path, config: RunConfig) -> Policy:
    """For the run in `directory`: one whose `state` its checkpoints overwrite, with whatever else they do not hold."""
    if config.policy.lora is None:
        return load_policy(directory / "model", weights=False)
    return base_policy(config, lambda *_: None)[0]


def _whole(config: RunConfig, progress: Progress, say: Callable[[str], None]) -> tuple[Policy, dict[str, Any] | None]:
    if config.policy.source != "tiny":
        return load_policy(hub.directory(config.policy, say=say)), None
    task = build(config.mixture[0])
    directory = _cache_directory(config, task)
    if not (directory / REPORT).is_file():
        _warm_start(config, task, directory, progress)
    return load_policy(directory), json.loads((directory / REPORT).read_text())


def _cache_directory(config: RunConfig, task: Task) -> Path:
    """One directory per recipe: everything that decides the weights is in the key."""
    recipe = {
        "task": [config.mixture[0].name, task.model_dump(mode="json")],  # with every default, written out or not
        "warm_start": config.policy.warm_start.model_dump(),
        "seed": config.run.seed,
        "torch": torch.__version__,
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    root = os.environ.get("SAPO_CACHE_DIR") or platformdirs.user_cache_dir("sapo")
    return Path(root) / "warm-start" / key


def _warm_start(config: RunConfig, task: Task, directory: Path, progress: Progress) -> None:
    if not isinstance(task, Teacher):
        raise ConfigError(
            f"task {config.mixture[0].called!r} has no demonstrations to warm-start a tiny policy on",
            where="policy.source",
            fix="give the directory of a model instead of 'tiny'",
        )
    policy = tiny_policy(task.alphabet, seed=config.run.seed)
    train, held_out = task.prompts("train"), task.prompts("held_out")

    def demonstrate(generator: Random, habit: bool) -> tuple[str, str]:
        prompt = generator.choice(train)
        imitated = task.demonstration(prompt, generator, habit=habit)
        earlier, turn = ("", imitated) if isinstance(imitated, str) else imitated
        return prompt.text + earlier.replace(END_OF_TURN, policy.tokenizer.eos_token), turn

    def correct(index: int, text: str, ended: bool) -> bool:
        return task.score(held_out[index], Response(text, "stop" if ended else "length"))["correct"] == 1

    def reply(index: int, turns: Sequence[str]) -> str | None:
        return task.reply(held_out[index], turns)

    report = warm_start(
        policy, demonstrate, [prompt.text for prompt in held_out], correct, config.policy.warm_start,
        seed=config.run.seed, progress=progress, reply=reply,
    )  # fmt: skip
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent))
    write_policy(policy, temporary)
    (temporary / REPORT).write_text(json.dumps(report.to_dict()))
    if not (directory / REPORT).is_file():
        shutil.rmtree(directory, ignore_errors=True)
    try:
        temporary.rename(directory)
    except OSError:  # another run was quicker, and may be reading the same there
        shutil.rmtree(temporary)
    log.info("warm start: %s", report)
