"""What can be known to be wrong with a configuration before any process is started."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sapo_learner.errors import ConfigError
from sapo_learner.manifest import TOKENIZER_FILES
from services.runtime.settings import RunConfig
from services.tasks import Task, Teacher, build

PROMPTS_CHECKED = 200  # the longest ones
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")
MODEL_FIX = "give the directory of a Hugging Face causal language model, or tiny"


def check(config: RunConfig, warn: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Build objective, filters and task, read its problems, look for the model; raises ConfigError for what is wrong.

    Returns the configuration in full: with the options of objective, filters and task that were not given. What is no
    mistake but worth knowing goes to `warn`.
    """
    from sapo_learner import filters, objectives

    objective = objectives.build(config.objective.name, **config.objective.options)
    objective.check(config)
    chosen = filters.build_all(config.filters).values()
    task = build(config.task)
    problems, held_out = task.problems("train"), len(task.problems("held_out"))
    if config.policy.source == "tiny":
        _check_teacher(task, held_out)
    else:
        where = f"policy.source {config.policy.source}"
        check_model(Path(config.policy.source), where=where)
        prompts = [each.prompt for each in (*problems, *task.problems("held_out"))]
        _check_prompts(Path(config.policy.source), prompts, config.sampling.max_tokens, where, warn)
    if not held_out:
        warn("no problem is held out: pass@1 will not be measured")
    options = task.model_dump(mode="json")  # type: ignore[attr-defined]
    return config.model_dump(mode="json") | {
        "objective": {"name": config.objective.name, **objective.model_dump(mode="json")},
        "filters": [
            {"name": given.name, **each.model_dump(mode="json")}
            for given, each in zip(config.filters, chosen, strict=True)
        ],
        "task": {"name": config.task.name, **options},
    }


def _check_teacher(task: Task, held_out: int) -> None:
    if not isinstance(task, Teacher):
        raise ConfigError(
            f"task {task.name!r} has no demonstrations to warm-start the tiny policy on",
            where="policy.source tiny", fix="give the directory of a Hugging Face causal language model",
        )  # fmt: skip
    if not held_out:
        raise ConfigError(
            "the tiny policy's warm start is measured on held-out problems, and there is none",
            where=f"task {task.name}", fix="hold some out",
        )  # fmt: skip


def check_model(directory: Path, *, where: str) -> None:
    """Refuse a directory that transformers cannot load as a causal language model, without loading its weights."""
    path = directory / "config.json"
    if not path.is_file():
        what = "no config.json there" if directory.is_dir() else "no such directory"
        raise ConfigError(what, where=where, fix=MODEL_FIX)
    try:
        kind = json.loads(path.read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "names no model_type" if isinstance(error, KeyError | TypeError) else f"is not readable: {error}"
        raise ConfigError(f"its config.json {what}", where=where, fix="copy the model there once more") from None
    # Slow to import, and needed by this alone.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal

    if kind not in causal:
        raise ConfigError(
            f"a model of type {kind!r} is no causal language model that the installed transformers knows",
            where=where, fix=MODEL_FIX,
        )  # fmt: skip
    if not any(found for pattern in WEIGHTS for found in directory.glob(pattern)):
        raise ConfigError("no weights there (*.safetensors)", where=where, fix="copy the whole model directory")
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError("no tokenizer there (tokenizer.json)", where=where, fix="copy the whole model directory")


def _check_prompts(
    directory: Path, prompts: list[str], max_tokens: int, where: str, warn: Callable[[str], None]
) -> None:
    """Hold the longest prompts against the model's vocabulary and context."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        model = AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(f"transformers cannot load it: {reason}", where=where, fix=MODEL_FIX) from None
    longest = [tokenizer.encode(each) for each in sorted(set(prompts), key=len)[-PROMPTS_CHECKED:]]
    highest, length = max((max(ids, default=0) for ids in longest), default=0), max(map(len, longest), default=0)
    if highest >= model.vocab_size:
        raise ConfigError(
            f"its tokenizer gives token ids up to {highest}, but the model knows only {model.vocab_size}",
            where=where, fix="take model and tokenizer from the same directory",
        )  # fmt: skip
    context = getattr(model, "max_position_embeddings", None)
    if context is not None and length + max_tokens > context:
        raise ConfigError(
            f"the longest prompt has {length} tokens; with {max_tokens} of a response that exceeds the model's context "
            f"of {context}",
            where="sampling.max_tokens", fix=f"set it to at most {context - length}" if context > length else
            "shorten the prompts, or use a model with a longer context",
        )  # fmt: skip
    if tokenizer.chat_template:
        warn("the tokenizer has a chat template, which is not applied: prompts go to the model as the task has them")


def find_beside(config: RunConfig, file: Path) -> None:
    """Paths are relative to the working directory: refuse one that is missing there, but lies beside run.yaml."""
    for key, value in _paths(config):
        beside = file.parent / value
        if not value.is_absolute() and not value.exists() and beside.exists():
            raise ConfigError(
                f"{value} is not in the working directory", where=f"{file}: {key}",
                fix=f"paths are relative to it, not to the file: use {beside}, or start from {file.parent}",
            )  # fmt: skip


def _paths(config: RunConfig) -> Iterator[tuple[str, Path]]:
    if config.objective.name.endswith(".py"):
        yield "objective.name", Path(config.objective.name)
    yield from (("filters", Path(each.name)) for each in config.filters if each.name.endswith(".py"))
    if config.policy.source != "tiny":
        yield "policy.source", Path(config.policy.source)
    for name, value in build(config.task):  # type: ignore[attr-defined]
        if isinstance(value, Path):
            yield f"task.{name}", value
