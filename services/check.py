"""`sapo check`: run the real stack for a few steps, twice, and judge what it recorded.

frozen      learning rate 0: every token is sampled under the policy that the learner has, so every ratio must be 1
moving      the same run goes on at a rate that changes the policy visibly, so that a stale cache or a mixture of two
            policies shows; again at a higher rate when it has hardly changed
"""

import asyncio
import math
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from sapo_learner.errors import Mismatch, SapoError
from services.check_report import print_judgement
from services.diagnosis import BOUNDS
from services.judge import Judgement, judge
from services.local import LocalRun
from services.preflight import check as check_config
from services.runstore import RunStore
from services.runtime.settings import Environment, RunConfig
from services.view import View

GROUPS_PER_STEP = 4  # at most
NEVER = 1 << 30
LOGIT_SHIFT = 0.1
"""What a first update shall move a logit by: AdamW moves each weight by about the rate, and a logit sums so many of
them as the model is wide."""
ROUNDS, FASTER = 3, 4.0  # of moving weights, each so much faster
LOST_SECONDS = 2.0
PROBE = "sapo_rollout_probe_max_abs_difference"


async def check(
    config: RunConfig, console: Console, *, steps: int, report: Callable[[dict[str, Any]], None] | None = None
) -> int:
    """Run, judge, print (or hand to `report`); returns the exit code. Raises SapoError for what cannot be run.

    steps: optimizer steps with frozen weights, and about as many with moving ones.
    """
    check_config(config, lambda remark: console.print(f"note: {remark}", markup=False))
    root = Path(tempfile.mkdtemp(prefix="sapo-check-"))
    keep = False
    try:
        stack = Stack(small(config, root / "run", steps), console)
        found = await stack.judged(steps)
        keep = found.verdict.state != "agrees"
    except SapoError:
        keep = True
        console.print(f"the run and its logs are kept in {root}", markup=False)
        raise
    finally:
        if not keep:
            shutil.rmtree(root, ignore_errors=True)
    probes = {"probes": stack.probes} if stack.probes else {}
    if report:
        report(found.to_dict() | probes | {"directory": str(root / "run") if keep else None})
    else:
        print_judgement(console, found, stack.probes)
        if keep:
            console.print(f"the run is kept in {root / 'run'}", markup=False)
    return {"agrees": 0, "disagrees": Mismatch.exit_code, "untested": SapoError.exit_code}[found.verdict.state]


def small(config: RunConfig, directory: Path, steps: int) -> RunConfig:
    """The user's model, task, sampling and engine; but few and small steps, every version kept, little evaluation.

    The policy age is bounded by all steps there can be, so that every version that sampled a token stays; how far
    sampling runs ahead is the user's own, up to one step.
    """
    most = steps + ROUNDS * _moving_steps(steps)
    return RunConfig.model_validate(
        config.model_dump(mode="json")
        | {
            "run": {"name": f"check-{secrets.token_hex(4)}", "dir": str(directory), "seed": config.run.seed},
            "training": config.training.model_dump() | {
                "steps": steps, "max_policy_age": max(most, config.training.max_policy_age),
                "groups_per_step": min(GROUPS_PER_STEP, config.training.groups_per_step),
            },
            "pacing": config.pacing.model_dump() | {"lookahead": min(1, config.lookahead), "publish_every": 1},
            "optimizer": config.optimizer.model_dump() | {
                "learning_rate": 0.0, "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.0,
            },
            "evaluation": {"every": NEVER, "samples": 1, "boundary_samples": 1},
            "checkpoint": {"every": NEVER, "keep": 1},
            "archive": {"keep": "all"},
            "probe": config.probe.model_dump() | {"on_miss": "warn"},  # the verdict says why
        }
    )  # fmt: skip


def moving(config: RunConfig, *, steps: int, rate: float) -> RunConfig:
    """The same run, going on for `steps` more at this learning rate."""
    training = config.training.model_copy(update={"steps": config.training.steps + steps})
    optimizer = config.optimizer.model_copy(update={"learning_rate": rate})
    return config.model_copy(update={"training": training, "optimizer": optimizer})


def _moving_steps(steps: int) -> int:
    """Groups for the first two may have been sampled ahead, before any update."""
    return steps + 2


class Stack:
    """The run, taken up again and again. probes: of each worker, the engine's own figure, where it exports one."""

    def __init__(self, config: RunConfig, console: Console) -> None:
        self._config, self._console = config, console
        self.probes: dict[str, float] = {}

    async def judged(self, steps: int) -> Judgement:
        """Frozen weights, then moving ones until a fault would show; stops early at what shows."""
        directory, config = self._config.run.directory, self._config
        try:
            self._console.print("frozen weights: every importance ratio must be 1 ...", style="dim")
            await self._run(config)
            found = await asyncio.to_thread(judge, directory)
            rate = LOGIT_SHIFT / _width(directory)
            for _ in range(ROUNDS):
                if found.verdict.state == "disagrees":
                    break
                self._console.print(f"moving weights: learning rate {rate:.1e} ...", style="dim")
                config = moving(config, steps=_moving_steps(steps), rate=rate)
                await self._run(config)
                found = await asyncio.to_thread(judge, directory)
                drifted = found.table.drift >= BOUNDS[config.policy.dtype].drift
                if drifted and (found.carried or not config.lookahead):
                    break
                rate *= 1 if drifted else FASTER
            return found
        finally:
            await _forget(config)

    async def _run(self, config: RunConfig) -> None:
        """Until the last step is done and published; evaluations are not waited for."""
        stop, interrupted = asyncio.Event(), asyncio.Event()

        def interrupt() -> None:
            interrupted.set()
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, interrupt)
        run = LocalRun(config, workers=config.local.rollout_workers)
        try:
            await run.start()
            with View(self._console) as draw:

                def drawn(run: LocalRun) -> None:
                    if _trained(run.status, config.training.steps):
                        stop.set()
                    draw(run)

                await run.finished(stop, drawn)
            if not interrupted.is_set():
                await self._read_probes(run)
        finally:
            await run.stop()
        if interrupted.is_set():
            raise KeyboardInterrupt

    async def _read_probes(self, run: LocalRun) -> None:
        async with httpx.AsyncClient(timeout=LOST_SECONDS) as client:
            for name, child in run.children.items():
                if name.startswith("rollout"):
                    try:
                        answer = await client.get(f"http://{child.http}/metrics")
                    except httpx.HTTPError:
                        continue  # it has just gone, or never came
                    for value in _samples(answer.text, PROBE):
                        self.probes[name] = max(value, self.probes.get(name, 0.0))


def _trained(status: dict[str, Any], steps: int) -> bool:
    """The learner says so once everything is published; the number of steps keeps an earlier session's word apart."""
    finished = status.get("state") in ("evaluating", "finished")
    return finished and status["learner"]["step"] >= steps


def _width(directory: Path) -> int:
    """Hidden width of the model."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(directory / "model", local_files_only=True).get_text_config().hidden_size)


def _samples(metrics: str, name: str) -> list[float]:
    """Those that have a figure: before the first, it is NaN."""
    families = text_string_to_metric_families(metrics)
    found = [sample.value for family in families for sample in family.samples if sample.name == name]
    return [each for each in found if math.isfinite(each)]


async def _forget(config: RunConfig) -> None:
    """An embedded Redis goes with the directory; a Redis that others use is left as it was."""
    if url := Environment().redis_url.get_secret_value():
        async with await RunStore.connect(url, config.run.name) as store:
            await store.erase()
