"""`sapo eval` and `sapo sample`: a policy and the small engine in this process, no services."""

import asyncio
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sapo_learner.errors import ConfigError
from sapo_learner.policy import Policy
from sapo_learner.snapshot import weights_digest
from services import evaluation_files
from services.control_plane.sampler import derive_seed
from services.evaluation import Counts, figures, overall
from services.evaluation_files import AnswerFile, Key, Line
from services.rollout.chat import Chat
from services.rollout.engines import Engine, PolicyVersion, Sampled, SampleRequest
from services.rollout.engines.torch_engine import TorchEngine
from services.rollout.evaluator import answer_prompt
from services.rollout.responder import Responder, ended
from services.rollout.scoring import Scorer
from services.run_directory import load_any_policy
from services.runtime.metrics import RolloutMetrics
from services.runtime.sampling_settings import ChatSettings
from services.runtime.settings import RunConfig
from services.suites import Suite
from services.tasks import Prompt

DEFAULT_MAX_TOKENS = 64
DEFAULT_SAMPLES = 2000  # of held-out prompts, in all, at least
EVALUATIONS = Path("evaluations")  # where a suite's answers go, in the working directory
Asked = tuple[str, Prompt]  # with the label of the task


@dataclass(frozen=True)
class Plan:
    """What is wanted; None: as the suite or the run has it.

    samples: per problem; None, and no suite: as many as make DEFAULT_SAMPLES in all. out: where every answer is written
    down.
    """

    given: RunConfig | None = None
    suite: Suite | None = None
    samples: int | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int = 0
    out: Path | None = None


@dataclass
class Progress:
    """How far an evaluation is. out: where its answers are."""

    total: int = 0
    done: int = 0
    correct: int = 0
    responses: int = 0
    out: Path | None = None


async def evaluate(name: str, plan: Plan, tell: Callable[[Progress], None] = lambda _: None) -> dict[str, Any]:
    """pass@1 and pass@k of a policy, on a suite or on the held-out prompts of its run; the same for the same seed.

    tell: called whenever a problem is done. Where `out` holds part of the same evaluation, the rest is done.
    """
    policy, own = await load_any_policy(name)
    config = _configuration(name, own, plan)
    metrics = RolloutMetrics()
    with Scorer(config.mixture, config.scoring, metrics) as scorer:
        prompts, samples = _asked(scorer, plan)
        engine = TorchEngine(policy, PolicyVersion(0, 0), slots=config.engine.slots)
        try:
            responder = Responder(engine, policy.tokenizer, scorer, config, metrics)
            _check_context(policy, responder, prompts, config)
            header = _header(policy, engine, responder, prompts, samples, config, plan)
            out = plan.out or (_default_out(plan.suite, header) if plan.suite else None)
            with AnswerFile(out, header) as answers:
                await _answer(responder, answers, prompts, samples, config, plan.seed, Progress(out=out), tell)
                lines = answers.finish([(label, prompt.id) for label, prompt in prompts])
        finally:
            await engine.close()
    result = _result(lines, samples, plan.suite)
    result = {"policy": name, "policy_digest": header["policy"], **result, **header["settings"]}
    if out is not None:
        evaluation_files.write(out / "summary.json", [result])
    return result | {"out": str(out) if out else None}


def _configuration(name: str, own: RunConfig | None, plan: Plan) -> RunConfig:
    """Tasks, chat, scoring and sampling of the evaluation."""
    suite, config = plan.suite, plan.given or own
    if suite is None and config is None:
        raise ConfigError(
            "a model directory does not say which problems to answer", where=name,
            fix="give --config RUN_YAML, or --set task.name=... and --set sampling.max_tokens=..., or --suite NAME",
        )  # fmt: skip
    config = config or RunConfig()
    sampling = {"temperature": 1.0, "max_tokens": config.sampling.max_tokens}
    if suite:
        sampling = {"temperature": suite.temperature, "max_tokens": suite.max_tokens or config.sampling.max_tokens}
        asked_for = plan.given is not None and "chat" in plan.given.model_fields_set
        chat = config.chat if asked_for or suite.chat is None else suite.chat
        config = config.model_copy(update={"task": suite.task_settings, "tasks": [], "chat": chat})
    for key, value in (("temperature", plan.temperature), ("max_tokens", plan.max_tokens)):
        sampling[key] = sampling[key] if value is None else value
    return config.model_copy(update={"sampling": config.sampling.model_copy(update=sampling)})


def _asked(scorer: Scorer, plan: Plan) -> tuple[list[Asked], int]:
    """The prompts, and how many responses each gets."""
    if plan.suite:
        (task,) = scorer.tasks.values()
        return [(plan.suite.name, each) for each in plan.suite.prompts(task)], plan.samples or plan.suite.samples
    prompts = [(label, each) for label, task in scorer.tasks.items() for each in task.prompts("held_out")]
    if not prompts:
        raise ConfigError(
            "no prompt is held out, so there is nothing to measure on", where=f"task {', '.join(scorer.tasks)}",
            fix="give task.held_out_path, or raise task.held_out_fraction",
        )  # fmt: skip
    return prompts, plan.samples or math.ceil(DEFAULT_SAMPLES / len(prompts))


def _check_context(policy: Policy, responder: Responder, prompts: Sequence[Asked], config: RunConfig) -> None:
    longest, limit = max(len(responder.encode(label, prompt)) for label, prompt in prompts), config.sampling.max_tokens
    if policy.context is not None and longest + limit > policy.context:
        room = policy.context - longest
        raise ConfigError(
            f"the longest prompt has {longest} tokens; with {limit} of a response that exceeds the model's context of "
            f"{policy.context}", where="--max-tokens",
            fix=f"give at most {room}" if room > 0 else "use a model with a longer context",
        )  # fmt: skip


def _header(
    policy: Policy, engine: Engine, responder: Responder, prompts: Sequence[Asked], samples: int, config: RunConfig,
    plan: Plan,
) -> Line:  # fmt: skip
    """What makes two evaluations the same one, but for `time`."""
    asked = [[label, each.id, responder.encode(label, each), each.answer, each.info] for label, each in prompts]
    suite = plan.suite
    return evaluation_files.header(
        policy=weights_digest(policy.tensors()),
        suite=suite.name if suite else None,
        suite_digest=suite.digest if suite else None,
        prompts_digest=_sha256(asked),
        versions={"engine": engine.name, **{name: metadata.version(name) for name in ("sapo", "transformers")}},
        settings={
            "samples_per_problem": samples, "temperature": config.sampling.temperature,
            "max_tokens": config.sampling.max_tokens, "seed": plan.seed,
        },
        time=time.time(),
    )  # fmt: skip


def _default_out(suite: Suite, header: Line) -> Path:
    """Another one for whatever makes another evaluation, so that the same command goes on and none is in the way."""
    identity = {key: value for key, value in header.items() if key != "time"}
    return EVALUATIONS / f"{suite.name}-{_sha256(identity)[:12]}"


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


async def _answer(
    responder: Responder, answers: AnswerFile, prompts: Sequence[Asked], samples: int, config: RunConfig, seed: int,
    progress: Progress, tell: Callable[[Progress], None],
) -> None:  # fmt: skip
    """Everything that is not there yet: as many problems at once as fill the engine, and as many that wait for it."""
    room = asyncio.Semaphore(max(1, 2 * config.engine.slots // samples))
    progress.total = len(prompts)
    _count(progress, [line for lines in answers.found.values() for line in lines], len(answers.found))
    tell(progress)

    async def one(label: str, prompt: Prompt) -> None:
        async with room:
            own = problem_seed(seed, label, prompt.id)
            found = await answer_prompt(responder, label, prompt, own, samples)
        lines = evaluation_files.sample_lines(label, prompt.id, own, found)
        answers.add(lines)
        _count(progress, lines, 1)
        tell(progress)

    async with asyncio.TaskGroup() as tasks:
        for label, prompt in prompts:
            if (label, prompt.id) not in answers.found:
                tasks.create_task(one(label, prompt))


def _count(progress: Progress, lines: Sequence[Line], problems: int) -> None:
    progress.done += problems
    progress.responses += len(lines)
    progress.correct += sum(line["correct"] for line in lines)


def problem_seed(seed: int, task: str, problem: str) -> int:
    """Of a problem's responses: the same whichever other problems are asked."""
    digest = hashlib.sha256(f"{task}\n{problem}".encode()).digest()
    return derive_seed(seed, 3, int.from_bytes(digest[:8], "big"))


def _result(lines: dict[Key, list[Line]], samples: int, suite: Suite | None) -> dict[str, Any]:
    labels = dict.fromkeys(task for task, _ in lines)
    counts = {
        label: _counts([found for (task, _), found in lines.items() if task == label], samples) for label in labels
    }
    by_task = {label: figures(each, suite.ks if suite else []) for label, each in counts.items()}
    single = next(iter(by_task.values())) if len(by_task) == 1 else overall(list(counts.values()))
    return {
        "task": ", ".join(labels), "suite": suite.name if suite else None, **single, "by_task": by_task,
        "per_problem": [
            {
                "task": task, "problem": problem, "correct": sum(line["correct"] for line in found),
                "samples": len(found), "mean_tokens": sum(line["tokens"] for line in found) / len(found),
            }
            for (task, problem), found in lines.items()
        ],
    }  # fmt: skip


def _counts(problems: Sequence[Sequence[Line]], samples: int) -> Counts:
    correct = [sum(line["correct"] for line in found) for found in problems]
    return Counts(correct, samples, sum(line["tokens"] for found in problems for line in found))


async def sample(
    name: str, prompt: str, *, count: int, temperature: float, max_tokens: int | None, seed: int, raw: bool = False
) -> list[dict[str, Any]]:
    """Responses with tokens and log-probs. raw: the prompt is taken as it stands, not as the run's prompts are."""
    policy, own = await load_any_policy(name)
    chat = Chat(policy.tokenizer, ChatSettings(template="none") if raw else own.chat if own else ChatSettings())
    max_tokens = max_tokens or (own.sampling.max_tokens if own else DEFAULT_MAX_TOKENS)
    if not policy.tokenizer.encode(prompt):
        raise ConfigError("no token for the policy to go on from", where="--prompt", fix="give some text")
    prompt_ids = chat.encode(Prompt(id="--prompt", content=prompt))
    responses = await _sample(policy, [prompt_ids] * count, temperature=temperature, max_tokens=max_tokens, seed=seed)
    return [
        {
            "prompt": prompt,
            "prompt_ids": prompt_ids,
            "chat": chat.template,
            "text": policy.tokenizer.decode(each.token_ids, skip_special_tokens=True),
            "finish_reason": ended(each),
            "logprob": sum(each.logprobs),
            "tokens": policy.tokenizer.convert_ids_to_tokens(each.token_ids),
            "token_ids": each.token_ids,
            "logprobs": each.logprobs,
        }
        for each in responses
    ]


async def _sample(
    policy: Policy, prompts: list[list[int]], *, temperature: float, max_tokens: int, seed: int
) -> list[Sampled]:
    engine = TorchEngine(policy, PolicyVersion(0, 0))

    async def one(index: int, prompt_ids: list[int]) -> Sampled:
        sampled = Sampled()
        request = SampleRequest(str(index), prompt_ids, derive_seed(seed, 3, index), max_tokens, temperature)
        async for delta in engine.generate(request):
            sampled.add(delta)
        return sampled

    try:
        return await asyncio.gather(*(one(index, prompt_ids) for index, prompt_ids in enumerate(prompts)))
    finally:
        await engine.close()
