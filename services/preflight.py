"""What can be known to be wrong with a configuration before any process is started."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sapo_learner.errors import ConfigError
from sapo_learner.manifest import TOKENIZER_FILES
from sapo_learner.model_files import MODEL_FIX, read_config, require_weights
from services import hub
from services.control_plane.sampler import Mixture
from services.record_writers import writer_classes
from services.rollout.chat import Chat
from services.runtime.settings import RunConfig
from services.tasks import Prompt, Split, Task, TaskSettings, Teacher, build, build_all

SPLITS: tuple[Split, ...] = ("train", "held_out")
PROMPTS_MEASURED = 200  # in tokens: the longest ones in characters
TINY_CONTEXT = 256  # tokens, as in sapo_learner.policy.tiny_policy


def check(config: RunConfig, warn: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Build objective, filters and tasks, read their prompts, look for the model; raises ConfigError for what is wrong.

    Returns the configuration in full: with the options of objective, filters and tasks that were not given. What is no
    mistake but worth knowing goes to `warn`.
    """
    from sapo_learner import filters, objectives, proximal

    objective = objectives.build(config.objective.name, **config.objective.options)
    objective.check(config)
    proximal.check(config, objective)
    if inert := proximal.remark(config):
        warn(inert)
    chosen = filters.build_all(config.filters).values()
    writer_classes(config.record.writers)
    tasks = build_all(config.mixture)
    Mixture(config.mixture, config.training.groups_per_step)
    held_out = _check_tasks(tasks, warn)
    fetched = hub.on_hub(config.policy)
    if config.policy.source == "tiny":
        _check_teacher(config, tasks, held_out)
    else:
        where = f"policy.source {config.policy.source}"
        model = hub.directory(config.policy, weights=False)
        check_model(model, where=where, weights=not fetched)
        _check_lora(config, model)
        _check_ranks(config, model)
        _check_prompts(model, config, tasks, where, warn)
    _check_suites(config, None if config.policy.source == "tiny" else model, warn)
    for label in [label for label, count in held_out.items() if not count]:
        warn(f"no prompt of task {label} is held out: its pass@1 will not be measured")
    return config.model_dump(mode="json") | {
        "objective": {"name": config.objective.name, **objective.model_dump(mode="json")},
        "filters": [
            {"name": given.name, **each.model_dump(mode="json")}
            for given, each in zip(config.filters, chosen, strict=True)
        ],
        "task": _in_full(config.task) if not config.tasks else config.task.model_dump(mode="json"),
        "tasks": [_in_full(each) for each in config.tasks],
    }


def _in_full(settings: TaskSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json") | build(settings).model_dump(mode="json")


def _check_tasks(tasks: Mapping[str, Task], warn: Callable[[str], None]) -> dict[str, int]:
    """Every task has prompts, and an id each of its own; returns how many each holds out."""
    held_out = {}
    for label, task in tasks.items():
        train, rest = task.prompts("train"), task.prompts("held_out")
        if not train:
            raise ConfigError("it has no prompt to train on", where=f"task {label}", fix="give it some")
        (most, count), *_ = Counter(each.id for each in (*train, *rest)).most_common(1)
        if count > 1:
            raise ConfigError(f"{count} prompts have the id {most!r}", where=f"task {label}", fix="give each its own")
        known = {each.content for each in rest}
        if shared := sum(each.content in known for each in train):
            warn(f"{shared} prompts of task {label} are trained on and held out, too: its pass@1 will flatter")
        task.ready()
        held_out[label] = len(rest)
    return held_out


def _check_teacher(config: RunConfig, tasks: Mapping[str, Task], held_out: Mapping[str, int]) -> None:
    label = config.mixture[0].called
    if not isinstance(tasks[label], Teacher):
        raise ConfigError(
            f"task {label!r} has no demonstrations to warm-start the tiny policy on",
            where="policy.source tiny", fix="give the directory of a Hugging Face causal language model",
        )  # fmt: skip
    if not held_out[label]:
        raise ConfigError(
            "the tiny policy's warm start is measured on held-out prompts, and there is none",
            where=f"task {label}", fix="hold some out",
        )  # fmt: skip


def check_model(directory: Path, *, where: str, weights: bool = True) -> None:
    """Refuse a directory that cannot be trained as a causal language model, without loading its weights.

    weights: whether they must be there already.
    """
    read_config(directory, where=where)
    if weights:
        require_weights(directory, where=where)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError("no tokenizer there (tokenizer.json)", where=where, fix="copy the whole model directory")


def _check_lora(config: RunConfig, directory: Path) -> None:
    if config.policy.lora is not None:
        from sapo_learner.lora import check_lora

        check_lora(directory, config.policy.lora)


def _check_ranks(config: RunConfig, directory: Path) -> None:
    """What can be told of a model without its weights; the learner tries it with them."""
    if config.parallel.processes > 1:
        from sapo_learner.empty_policy import empty_policy
        from sapo_learner.sharding import check_shape

        check_shape(empty_policy({"config.json": (directory / "config.json").read_bytes()}, packs=False))


def _check_prompts(
    directory: Path, config: RunConfig, tasks: Mapping[str, Task], where: str, warn: Callable[[str], None]
) -> None:
    """Every prompt goes through the chat template; the longest are held against the model's vocabulary and context."""
    from transformers import AutoConfig, AutoTokenizer

    max_tokens = config.sampling.max_tokens
    try:
        model = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(f"transformers cannot load it: {reason}", where=where, fix=MODEL_FIX) from None
    chat, prompts = Chat(tokenizer, config.chat), []
    for label, each in _prompts(tasks):
        chat.check(each, task=label)
        prompts.append(each)
    longest = [chat.encode(each) for each in sorted(prompts, key=_length)[-PROMPTS_MEASURED:]]
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
    if chat.template and any(isinstance(each.content, str) for each in prompts):
        warn(
            "prompts go to the policy through its tokenizer's chat template; chat.template: none leaves them as they "
            "are"
        )


def _check_suites(config: RunConfig, model: Path | None, warn: Callable[[str], None]) -> None:
    """Each can be asked, and its responses fit the model's context: a worker that finds out in mid-run would end.

    model: None for the tiny policy, of which every character is a token.
    """
    for suite in config.evaluation.suites:
        if not suite.checked:
            warn(f"suite {suite.name} is not checked: nobody here has held it against its data")
        task = build(suite.task_settings)
        prompts = sorted(suite.prompts(task), key=_length)
        task.ready()
        limit, chat = suite.max_tokens or config.sampling.max_tokens, None
        context: int | None = TINY_CONTEXT
        if model is not None:
            from transformers import AutoConfig, AutoTokenizer

            text = AutoConfig.from_pretrained(model, local_files_only=True).get_text_config()
            context = getattr(text, "max_position_embeddings", None)
            chat = Chat(AutoTokenizer.from_pretrained(model, local_files_only=True), suite.chat or config.chat)
            for each in prompts:
                chat.check(each, task=f"of suite {suite.name}")
        longest = max(len(chat.encode(each)) if chat else _length(each) for each in prompts[-PROMPTS_MEASURED:])
        if context is not None and longest + limit > context:
            raise ConfigError(
                f"the longest prompt has {longest} tokens; with {limit} of a response that exceeds the model's context "
                f"of {context}", where=f"suite {suite.name}", fix="lower its max_tokens",
            )  # fmt: skip


def _prompts(tasks: Mapping[str, Task]) -> Iterator[tuple[str, Prompt]]:
    """With the labels of their tasks."""
    for label, task in tasks.items():
        yield from ((label, prompt) for split in SPLITS for prompt in task.prompts(split))


def _length(prompt: Prompt) -> int:
    """Characters of all messages."""
    return len(prompt.content) if isinstance(prompt.content, str) else sum(len(each.content) for each in prompt.content)


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
    for settings in config.mixture:
        if settings.name.endswith(".py"):
            yield "task.name", Path(settings.name)
            if not Path(settings.name).exists():
                continue  # it cannot be built
        for name, value in build(settings):
            if isinstance(value, Path):
                yield f"task.{name}", value
