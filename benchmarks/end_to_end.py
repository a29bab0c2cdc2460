"""From the same base policy to the same held-out pass@1: the whole stack against TRL's GRPOTrainer, side by side.

    make end-to-end                         the demo, three seeds: about eight minutes
    python -m benchmarks.end_to_end --small     a few steps: shows that it works

The stack is `sapo up` on the demo, all its processes and Redis counted; TRL samples with transformers' `generate` and
trains in turns, in one process. Same task, prompts, reward, prompts per step, group size, loss (SAPO) and learning
rate. The policy of every fifth step is evaluated afterwards, by the same code; neither the evaluation nor the warm
start of the base policy is in anybody's time. Writes benchmarks/results/end_to_end.md.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.end_to_end_sides import BASE, Plan, Reading, our_policy, ours, train_with_trl, trl, trl_policy
from benchmarks.machine import machine
from sapo_learner.policy import Policy, write_policy
from sapo_learner.warm_start import measure
from services.learner.base_policy import base_policy
from services.tasks import Response, Task, build

RESULTS = Path(__file__).parent / "results" / "end_to_end.md"
REPORT = """\
# The whole way, beside TRL

    {command}

{date}, {machine}, no GPU; torch {torch}, transformers {transformers}, TRL {trl}; one thread per process.

The demo (`deploy/examples/demo.yaml`) from its base policy to {target:.0%} held-out pass@1: the first policy, of every
{every}th step, that reaches it over {samples:,} samples, evaluated afterwards for both. Ours is asynchronous, in
{processes} processes; TRL alternates, in one, with all responses of a step in one batch. Both
divide advantages by the sample standard deviation + 1e-4, as TRL does. CPU seconds (user and system, of all processes,
Redis included) and wall seconds from the start of the first process, imports included. From step 1: less what the first
step and everything before it took. Per step: that, over the steps in between. Load of the machine at the end, with what
else ran there: {load:.1f}; wall seconds are no better than that allows.

| seed | side | base pass@1 | step | pass@1 there | CPU s | from step 1 | per step | wall s | from step 1 |
|---|---|---|---|---|---|---|---|---|---|
{rows}
TRL over ours, CPU seconds, median (lowest-highest seed): {ratio}; from step 1: {later}.

Where ours went, CPU seconds, medians over the seeds:

| process | until step 1 | from step 1 | share |
|---|---|---|---|
{shares}
The policy has 0.2 M parameters. Until step 1 it is imports, of torch above all, in three processes where TRL has one.
After that about half of what a rollout worker takes is sampling, and a third of what the learner takes is the optimizer
step (by a sampling profiler, once); the rest is what an asynchronous service does for every step or group whatever the
model's size: event loops, HTTP, gRPC, validation, the archive on disk, a snapshot per step. `learner.md` has what
training itself takes where the model is larger.
"""


@dataclass(frozen=True)
class Outcome:
    """Of the first kept policy that was good enough."""

    step: int
    accuracy: float
    first: Reading  # at step 1
    reached: Reading

    @property
    def later(self) -> float:
        return self.reached.total - self.first.total


SIDES = {"ours": (ours, our_policy), "TRL": (trl, trl_policy)}


def run(plan: Plan, target: float, samples: int, sides: list[str]) -> tuple[float, dict[str, Outcome]]:
    """Accuracy of the base policy, and what either side needed."""
    with tempfile.TemporaryDirectory(prefix="sapo-end-to-end-") as name:
        scratch = Path(name)
        config = plan.config(scratch / "run")
        base, _ = base_policy(config, lambda *_: None)
        write_policy(base, scratch / BASE)
        task: Task = build(config.mixture[0])
        prompts = task.prompts("held_out")

        def accuracy(policy: Policy) -> float:
            def correct(index: int, text: str, ended: bool) -> bool:
                return task.score(prompts[index], Response(text, "stop" if ended else "length"))["correct"] == 1

            torch.manual_seed(plan.seed)
            texts = [each.text for each in prompts]
            return measure(policy, texts, correct, samples, config.sampling.max_tokens).mean

        def outcome(side: str) -> Outcome:
            trained, policy = SIDES[side]
            readings = trained(plan, scratch)
            for step in sorted(each for each in readings if each % plan.every == 0):
                found = accuracy(policy(scratch, step))
                print(f"seed {plan.seed}, {side}, step {step}: {found:.3f}, {readings[step]}", file=sys.stderr)
                if found >= target:
                    return Outcome(step, found, readings[1], readings[step])
            sys.exit(f"{side} did not reach {target:.0%} within {plan.steps} steps (seed {plan.seed})")

        return accuracy(base), {side: outcome(side) for side in sides}


def rows_of(seed: int, base: float, outcomes: dict[str, Outcome]) -> str:
    rows = ""
    for side, each in outcomes.items():
        cells = [
            seed, side, f"{base:.1%}", each.step, f"{each.accuracy:.1%}", f"{each.reached.total:.1f}",
            f"{each.later:.1f}", f"{each.later / (each.step - 1):.2f}", f"{each.reached.wall:.1f}",
            f"{each.reached.wall - each.first.wall:.1f}",
        ]  # fmt: skip
        rows += f"| {' | '.join(map(str, cells))} |\n"
    return rows


def shares_of(outcomes: list[Outcome]) -> str:
    """Of our processes."""
    if not outcomes:
        return ""
    names = sorted({name for each in outcomes for name in each.reached.cpu})
    total = statistics.median(each.reached.total for each in outcomes)
    rows = ""
    for name in names:
        first = statistics.median(each.first.cpu.get(name, 0.0) for each in outcomes)
        later = statistics.median(each.reached.cpu[name] - each.first.cpu.get(name, 0.0) for each in outcomes)
        rows += f"| {name} | {first:.1f} | {later:.1f} | {(first + later) / total:.0%} |\n"
    return rows


def ratio(outcomes: list[dict[str, Outcome]], figure: Callable[[Outcome], float]) -> str:
    """Of TRL's figure to ours."""
    both = [(figure(each["TRL"]), figure(each["ours"])) for each in outcomes if len(each) == len(SIDES)]
    ratios = sorted(theirs / own if own else math.inf for theirs, own in both)
    if not ratios:
        return "not measured"
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--target", type=float, default=0.8, help="held-out pass@1")
    parser.add_argument("--samples", type=int, default=2000, help="of an evaluation, at least")
    parser.add_argument("--policy", type=Path, help="model directory to begin with, instead of the warm-started one")
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=list(SIDES))
    parser.add_argument("--small", action="store_true", help="four steps, of which any is good enough")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--trl", nargs=2, metavar=("PLAN", "SCRATCH"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trl:
        return train_with_trl(Plan(**json.loads(given.trl[0])), Path(given.trl[1]))
    settings: dict[str, Any] = {} if given.policy is None else {"policy.source": str(given.policy.resolve())}
    plans = [Plan(seed, given.steps, every=5, settings=settings) for seed in given.seeds]
    if given.small:
        given.target, given.samples = 0.0, 1
        settings |= {"training.groups_per_step": 4, "local.rollout_workers": 1}
        plans = [Plan(seed, steps=4, every=2, settings=settings) for seed in given.seeds[:1]]
    found = [run(plan, given.target, given.samples, given.sides) for plan in plans]
    outcomes = [each for _, each in found]
    own = [each["ours"] for each in outcomes if "ours" in each]
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "trl")}
    text = REPORT.format(
        command="make end-to-end" if not given.small else "python -m benchmarks.end_to_end --small", **versions,
        date=datetime.now(UTC).date(), machine=machine(), target=given.target, every=plans[0].every,
        samples=given.samples, load=os.getloadavg()[0], processes=len(own[0].reached.cpu) if own else 0,
        rows="".join(rows_of(plan.seed, *each) for plan, each in zip(plans, found, strict=True)),
        ratio=ratio(outcomes, lambda each: each.reached.total), later=ratio(outcomes, lambda each: each.later),
        shares=shares_of(own),
    )  # fmt: skip
    given.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
