"""Optimizer steps of the learner, and log-probs of several kinds, on one NVIDIA GPU: time, MFU, peak memory.

    python -m benchmarks.gpu                        on a GPU: at most 25 minutes
    python -m benchmarks.gpu --only 0.6B --out x.md  a part of it
    python -m benchmarks.gpu --small                the same code in miniature, on a CPU: one minute, and no claim

Every row is a fresh process, so that neither memory nor a crash of one reaches the next. Out of memory is a row that
says so. The file is written anew after every row.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import Case, cases, measure
from benchmarks.gpu_report import report
from sapo_learner.parallel import device_of_rank

RESULTS = Path(__file__).parent / "results" / "gpu.md"
ROW_SECONDS = 300.0  # one row that hangs must not cost the others


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="in miniature, on the CPU")
    parser.add_argument("--minutes", type=float, default=25.0, help="what is not reached by then is skipped")
    parser.add_argument("--only", metavar="TEXT", default="", help='rows that have it in "steps, 0.6B, 2048 tokens"')
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", metavar="CASE", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not given.small and not torch.cuda.is_available():
        parser.error("torch finds no NVIDIA GPU here; --small runs the same code in miniature, on the CPU")
    if given.one:
        device = torch.device("cpu") if given.small else device_of_rank()
        print(json.dumps(measure(Case(**json.loads(given.one)), device)))
        return
    asked = [each for each in cases(small=given.small) if given.only in str(each)]
    if not asked:
        parser.error(f"no row has {given.only!r} in its name; they are {'; '.join(map(str, cases(small=given.small)))}")
    ends = time.monotonic() + 60 * given.minutes
    figures: dict[Case, dict[str, Any]] = {}
    for case in asked:
        left = ends - time.monotonic()
        if left > 0:
            print(f"{case} ...", file=sys.stderr, flush=True)
            figures[case] = in_fresh_process(case, small=given.small, seconds=min(left, ROW_SECONDS))
        text = report(asked, figures, command=_command(given), small=given.small, minutes=given.minutes)
        given.out.write_text(text)
    print(text)


def in_fresh_process(case: Case, *, small: bool, seconds: float) -> dict[str, Any]:
    """What `measure` found, or the "problem" that ended it."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--one", json.dumps(asdict(case)), *["--small"] * small]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"problem": f"stopped after {seconds:.0f} s"}
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        said = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return {"problem": f"failed: {said[:200].replace('|', '/')}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _command(given: argparse.Namespace) -> str:
    only = f" --only '{given.only}'" if given.only else ""
    return f"python -m benchmarks.gpu{' --small' * given.small}{only} --minutes {given.minutes:g}"


if __name__ == "__main__":
    main()
