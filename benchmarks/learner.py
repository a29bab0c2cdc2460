"""CPU time of optimizer steps on recorded groups: our learner against TRL's GRPOTrainer, side by side.

    make learner                                                    Qwen3, 4 x 256, 64 responses per step: ten minutes
    python -m benchmarks.learner --small --lengths heavy-tailed     in miniature: twenty seconds

Neither samples nor scores. Every repetition is a fresh process with one thread for each side, in turns; its first step
is left out of the times, and the gradients of the first steps are compared: both did the same job, or there is no
report. Writes benchmarks/results/learner.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, astuple, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import learner_sides
from benchmarks.learner_sides import Job, Step, recorded, response_lengths, rows_per_pass
from benchmarks.machine import machine

RESULTS = Path(__file__).parent / "results" / "learner.md"
LENGTHS = ("heavy-tailed", "equal")
SIDES = ("ours", "trl")
FULL = Job("", responses=64, tokens=96, hidden=256, layers=4, vocabulary=8192, microbatch_tokens=4096)
SMALL = Job("", responses=16, tokens=12, hidden=64, layers=2, vocabulary=64, microbatch_tokens=256)
AGREEMENT = 1e-4
BARS = {"heavy-tailed": "at least 2", "equal": "at least 1"}
REPORT = """\
# Optimizer steps beside TRL

    {command}

{date}, {machine}, no GPU; torch {torch}, transformers {transformers}, TRL {trl}; one thread, float32.

The same recorded groups on both sides, {responses} responses per step in groups of {group}, all with signal; Qwen3 with
{layers} layers of {hidden}, vocabulary {vocabulary:,}, {parameters:.1f} M parameters. A step begins with recorded
groups and ends after the optimizer: advantages, batches, loss (SAPO), backward, clipping, AdamW; sampling and rewards
are left out. Neither side checkpoints activations; a forward pass has at most {microbatch_tokens:,} tokens, with
padding where there is some. TRL runs its own training loop (`GRPOTrainer.train`) on the padded batch that it would have
made; logging is not in its time. Each repetition is a fresh process for each side, in turns, with one step that does
not count and one that does; medians of {repeat}. On a CPU TRL computes log-probs at every position, prompts and padding
too, and drops what is not trained; on a GPU it leaves them out, so these ratios are a CPU's.

Positions: what the model computes, prompts and padding included. Rows: of a forward pass. CPU and wall: µs per trained
token. Peak: memory above that before the step. Ratio of a repetition: TRL's CPU seconds over ours. Gradients: of the
first step, their difference as a share of the norm.

| lengths | longest / mean | side | rows | positions per trained token | CPU | wall | peak MiB |
|---|---|---|---|---|---|---|---|
{rows}
| lengths | TRL / ours, CPU | lowest and highest repetition | bar | difference of the gradients |
|---|---|---|---|---|
{ratios}"""


def measure(side: str, job: Job, gradient: Path) -> Step:
    """In a fresh process: the second of two steps."""
    command = [sys.executable, "-m", "benchmarks.learner", "--one", side, json.dumps(asdict(job)), str(gradient)]
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | threads)
    if done.returncode:
        sys.exit(f"{side}, {job.lengths}: the process ended with status {done.returncode}")
    return Step(*json.loads(done.stdout.splitlines()[-1]))


def one(side: str, job: Job, gradient: Path) -> None:
    torch.set_num_threads(1)
    steps = [recorded(job, seed) for seed in range(2)]
    timed = getattr(learner_sides, side)(job, steps, gradient)
    print(json.dumps(astuple(timed[-1])))


def gradient_difference(job: Job, scratch: Path) -> float:
    mine, theirs = (torch.load(scratch / f"{job.lengths}-{side}.pt", weights_only=True).double() for side in SIDES)
    difference = float((mine - theirs).norm() / theirs.norm())
    if not difference <= AGREEMENT:
        sys.exit(f"{job.lengths}: the gradients of the first steps differ by {difference:.1e}, it is not the same job")
    return difference


def positions(side: str, job: Job) -> float:
    """Per trained token; of TRL, at the longest prompt and the longest response of the step that counts."""
    groups = recorded(job, 1)
    prompts = [len(group.prompt_ids) for group in groups for _ in group.trajectories]
    lengths = [len(each.token_ids) for group in groups for each in group.trajectories]
    if side == "ours":
        return (sum(prompts) + sum(lengths)) / sum(lengths)
    return len(lengths) * (max(prompts) + max(lengths)) / sum(lengths)


def rows_of(job: Job, steps: dict[str, list[Step]]) -> str:
    """Of the first table, both sides."""
    lengths, rows = response_lengths(job), ""
    for side in SIDES:
        medians = [statistics.median(column) for column in zip(*map(astuple, steps[side]), strict=True)]
        cpu, wall, peak = medians[0] / lengths.sum(), medians[1] / lengths.sum(), medians[2] / 2**20
        cells = [
            job.lengths, f"{lengths.max() / lengths.mean():.1f}", {"ours": "ours", "trl": "TRL"}[side],
            "packed" if side == "ours" else rows_per_pass(job), f"{positions(side, job):.2f}", f"{cpu * 1e6:,.0f}",
            f"{wall * 1e6:,.0f}", f"{peak:,.0f}",
        ]  # fmt: skip
        rows += f"| {' | '.join(map(str, cells))} |\n"
    return rows


def ratio_of(job: Job, steps: dict[str, list[Step]], difference: float) -> str:
    mine, theirs = ([each.cpu_seconds for each in steps[side]] for side in SIDES)
    ratio = statistics.median(theirs) / statistics.median(mine)
    ratios = sorted(their / my for my, their in zip(mine, theirs, strict=True))
    spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
    return f"| {job.lengths} | {ratio:.2f} | {spread} | {BARS[job.lengths]} | {difference:.1e} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="processes per side; the median counts")
    parser.add_argument("--lengths", choices=LENGTHS, nargs="+", default=LENGTHS)
    parser.add_argument("--small", action="store_true", help="a tiny model, once: shows that it works, no more")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "JOB", "GRADIENT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        return one(given.one[0], Job(**json.loads(given.one[1])), Path(given.one[2]))
    repeat, size = (1, SMALL) if given.small else (given.repeat, FULL)
    jobs = [replace(size, lengths=lengths) for lengths in given.lengths]
    with tempfile.TemporaryDirectory(prefix="sapo-learner-") as scratch:
        figures = measured(jobs, repeat, Path(scratch))
        differences = [gradient_difference(job, Path(scratch)) for job in jobs]
    facts = asdict(size) | {"group": learner_sides.GROUP, "repeat": repeat}
    model = learner_sides.policy_of(size).model
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "trl")}
    text = REPORT.format(
        command="make learner" if not given.small else "python -m benchmarks.learner --small", **facts, **versions,
        date=datetime.now(UTC).date(), machine=machine(), parameters=model.num_parameters() / 1e6,
        rows="".join(rows_of(job, figures[job.lengths]) for job in jobs),
        ratios="".join(ratio_of(job, figures[job.lengths], each) for job, each in zip(jobs, differences, strict=True)),
    )  # fmt: skip
    given.out.write_text(text)
    print(text)


def measured(jobs: list[Job], repeat: int, scratch: Path) -> dict[str, dict[str, list[Step]]]:
    """Lengths -> side -> repetitions, taking turns, so that whatever else the machine does hits both alike."""
    figures: dict[str, dict[str, list[Step]]] = {job.lengths: {side: [] for side in SIDES} for job in jobs}
    for number in range(repeat):
        for job in jobs:
            for side in SIDES:
                step = measure(side, job, scratch / f"{job.lengths}-{side}.pt")
                print(f"{number + 1} of {repeat}: {side}, {job.lengths}: {step}", file=sys.stderr)
                figures[job.lengths][side].append(step)
    return figures


if __name__ == "__main__":
    main()
