"""What can be known to be wrong with a configuration before any process is started."""

from pathlib import Path
from typing import Any

from sapo_learner.errors import ConfigError
from services.runtime.settings import RunConfig
from services.tasks import Teacher, build


def check(config: RunConfig) -> dict[str, Any]:
    """Build the objective and the task, read its problems, look for the model; raises ConfigError for what is wrong.

    Returns the configuration in full: with the options of the objective and of the task that were not given.
    """
    from sapo_learner import objectives

    objective = objectives.build(config.objective.name, **config.objective.options)
    task = build(config.task)
    for split in ("train", "held_out"):
        task.problems(split)
    source = config.policy.source
    if source == "tiny":
        if not isinstance(task, Teacher):
            raise ConfigError(
                f"task {config.task.name!r} has no demonstrations to warm-start the tiny policy on",
                where="policy.source",
                fix="give the directory of a Hugging Face causal language model",
            )
    elif not (Path(source) / "config.json").is_file():
        raise ConfigError(
            "no config.json there",
            where=f"policy.source {source}",
            fix="give the directory of a Hugging Face causal language model, or tiny",
        )
    options = task.model_dump(mode="json")  # type: ignore[attr-defined]
    return config.model_dump(mode="json") | {
        "objective": {"name": config.objective.name, **objective.model_dump(mode="json")},
        "task": {"name": config.task.name, **options},
    }
