"""The same post-training by the whole stack (`sapo up`) and by TRL's GRPOTrainer, with what each had used at its steps.

Both begin with the same policy and leave the one of every `every`-th step behind, for somebody else to evaluate. CPU
time is user and system, of all processes; it and the wall time begin with the start of the first process.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from sapo_learner.policy import Policy, load_policy
from services.control_plane.record import read
from services.run_directory import live_services, load_any_policy
from services.runtime.settings import RunConfig, load_config
from services.tasks import Response, Task, build

POLL_SECONDS, STOP_SECONDS = 0.2, 60.0
ROOT = Path(__file__).parent.parent
DEMO = ROOT / "deploy" / "examples" / "demo.yaml"
BASE, TRL_READINGS = "base", "readings.json"


@dataclass(frozen=True)
class Plan:
    """steps: of optimizer, on both sides. every: steps from one policy that is kept to the next. settings: changes to
    the demo's run.yaml."""

    seed: int
    steps: int
    every: int
    settings: Mapping[str, Any]

    def config(self, directory: Path) -> RunConfig:
        """Of both sides. The estimate of advantages is TRL's, and nothing is evaluated while time is taken, but once
        at either end, as briefly as can be."""
        settings = {
            "run.seed": self.seed, "run.dir": directory, "training.steps": self.steps, "checkpoint.every": self.every,
            "checkpoint.keep": self.steps, "advantages.std": "sample", "advantages.eps": 1e-4,
            "evaluation.every": 1 << 30, "evaluation.samples": 1, "evaluation.boundary_samples": 1, **self.settings,
        }  # fmt: skip
        return load_config(DEMO, [f"{key}={value}" for key, value in settings.items()])


@dataclass(frozen=True)
class Reading:
    """When a step was done: seconds since the start, and CPU seconds so far by process."""

    wall: float
    cpu: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.cpu.values())


class Tree:
    """CPU seconds of a process and all that it has started, by name; what has ended counts with what was last seen."""

    def __init__(self, root: int) -> None:
        self._root, self._names = psutil.Process(root), {root: "sapo up"}
        self._seconds: dict[tuple[int, float], tuple[str, float]] = {}

    def name(self, processes: Mapping[str, Mapping[str, Any]]) -> None:
        """processes: as `LocalServices` has them. Children of a service count as the service."""
        self._names |= {int(each["pid"]): name for name, each in processes.items()}

    def read(self) -> dict[str, float]:
        for process in [self._root, *self._root.children(recursive=True)]:
            try:
                times, key = process.cpu_times(), (process.pid, process.create_time())
                self._seconds[key] = self._name(process), times.user + times.system
            except psutil.NoSuchProcess:
                continue  # it counts with what was seen of it
        sums: dict[str, float] = {}
        for name, seconds in self._seconds.values():
            sums[name] = sums.get(name, 0.0) + seconds
        return sums

    def _name(self, process: psutil.Process) -> str:
        lineage = [process, *process.parents()]
        return next((self._names[each.pid] for each in lineage if each.pid in self._names), "other")


def ours(plan: Plan, scratch: Path) -> dict[int, Reading]:
    """`sapo up`, stopped after its last step; readings of the first and of every `every`-th. Checkpoints, which are
    saved before a step is on record, stay in `scratch`/run."""
    directory = scratch / "run"
    path = scratch / "run.yaml"
    path.write_text(plan.config(directory).model_dump_json())  # JSON is YAML
    command = [sys.executable, "-m", "services.cli", "up", str(path)]
    readings: dict[int, Reading] = {}
    began = time.monotonic()
    with (scratch / "up.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            tree = Tree(process.pid)
            while process.poll() is None and plan.steps not in readings:
                if services := live_services(directory):
                    tree.name(services.processes)
                steps = wanted(plan, last_step(directory))
                cpu, wall = tree.read(), time.monotonic() - began
                for step in steps:
                    readings.setdefault(step, Reading(wall, cpu))
                time.sleep(POLL_SECONDS)
            process.send_signal(signal.SIGINT)
            process.wait(STOP_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(STOP_SECONDS)
    if process.returncode or plan.steps not in readings:
        sys.exit(f"`sapo up` ended with status {process.returncode}:\n{(scratch / 'up.log').read_text()}")
    return readings


def wanted(plan: Plan, done: int) -> list[int]:
    return [step for step in range(1, done + 1) if step == 1 or step % plan.every == 0]


def last_step(directory: Path) -> int:
    path = directory / "record.jsonl"
    steps = [line["step"] for line in read(path) if line["kind"] == "step"] if path.exists() else []
    return max(steps, default=0)


def our_policy(scratch: Path, step: int) -> Policy:
    return asyncio.run(load_any_policy(f"{scratch / 'run'}@{step}"))[0]


def trl(plan: Plan, scratch: Path) -> dict[int, Reading]:
    """As `ours`, in one process of its own. What it takes to keep a policy is not in its readings."""
    command = [sys.executable, "-m", "benchmarks.end_to_end", "--trl", json.dumps(asdict(plan)), str(scratch)]
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (scratch / "trl.log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=os.environ | threads, cwd=ROOT)
    if done.returncode:
        sys.exit(f"TRL ended with status {done.returncode}:\n{(scratch / 'trl.log').read_text()}")
    found = json.loads((scratch / TRL_READINGS).read_text())
    return {int(step): Reading(**each) for step, each in found.items()}


def train_with_trl(plan: Plan, scratch: Path) -> None:
    """In this process: GRPOTrainer as one would use it for this task."""
    torch.set_num_threads(1)
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    config, policy = plan.config(scratch / "run"), load_policy(scratch / BASE)
    task: Task = build(config.mixture[0])
    prompts = task.prompts("train")
    readings: dict[int, dict[str, Any]] = {}
    kept = [0.0, 0.0]  # wall and CPU seconds that keeping policies has taken

    def correct(completions: list[str], completion_ids: list[list[int]], index: list[int], **_: Any) -> list[float]:
        ended = ["stop" if ids[-1] in policy.end_ids else "length" for ids in completion_ids]
        answers = zip(index, completions, ended, strict=True)
        return [task.score(prompts[each], Response(text, end))["correct"] for each, text, end in answers]

    class Keep(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, _: Any, state: Any, __: Any, **___: Any) -> None:
            step = state.global_step
            if step not in wanted(plan, step):
                return
            wall, cpu = time.time() - psutil.Process().create_time(), time.process_time()
            readings[step] = asdict(Reading(wall - kept[0], {"TRL": cpu - kept[1]}))
            torch.save(policy.model.state_dict(), scratch / f"trl-{step}.pt")
            kept[0] += time.time() - psutil.Process().create_time() - wall
            kept[1] += time.process_time() - cpu

    data = {"prompt": [each.text for each in prompts], "index": list(range(len(prompts)))}
    trainer = GRPOTrainer(
        model=policy.model, reward_funcs=correct, args=trl_arguments(plan, config, scratch),
        processing_class=policy.tokenizer, train_dataset=Dataset.from_dict(data), callbacks=[Keep()],
    )  # fmt: skip
    trainer.train()
    (scratch / TRL_READINGS).write_text(json.dumps(readings))


def trl_arguments(plan: Plan, config: RunConfig, scratch: Path) -> Any:
    """GRPOConfig with what the run has; all responses of a step are one batch, for sampling as for training."""
    from trl import GRPOConfig

    options, sampling = config.optimizer, config.sampling
    return GRPOConfig(
        output_dir=str(scratch / "trl"), loss_type="sapo", max_steps=plan.steps, seed=plan.seed,
        num_generations=sampling.group_size, gradient_accumulation_steps=1,
        per_device_train_batch_size=config.training.groups_per_step * sampling.group_size,
        max_completion_length=sampling.max_tokens, temperature=sampling.temperature,
        learning_rate=options.learning_rate, lr_scheduler_type="constant_with_warmup",
        warmup_steps=options.warmup_steps, adam_beta2=options.beta2, weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm, activation_checkpointing=False, bf16=False, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip


def trl_policy(scratch: Path, step: int) -> Policy:
    policy = load_policy(scratch / BASE)
    policy.model.load_state_dict(torch.load(scratch / f"trl-{step}.pt", weights_only=True))
    return policy
