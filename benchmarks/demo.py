"""What the demo promises, over seeds: base, trained and ceiling pass@1, ages, and the log-probs' agreement.

    .venv/bin/python benchmarks/demo.py --seeds 0 1 2 3

Each seed is a whole `sapo up deploy/examples/demo.yaml` with an empty cache. Writes benchmarks/results/demo.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HEADER = """\
# The demo over seeds

    {command}

Held-out pass@1 over {samples} responses each, mean ± standard error. Ages in optimizer steps. Mixed: responses sampled
under more than one version. Overlap: share of optimizer-step time in which a worker sampled. Log-prob difference:
recorded by the engine against recomputed from the stored snapshots, the largest of all probes. Seconds: the whole
command, warm start included, after installation; on {cores} cores.

| seed | base | after RL | ceiling | age mean / max | stale | mixed | overlap | log-prob difference | ledger | seconds |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def run(seed: int) -> dict[str, Any]:
    """One demo; its summary, and how long the command took."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable, "-m", "services.cli", "up", str(ROOT / "deploy/examples/demo.yaml"),
            "--set", f"run.seed={seed}", "--set", f"run.dir={scratch}/run",
        ]  # fmt: skip
        started = time.monotonic()
        subprocess.run(command, cwd=ROOT, env=os.environ | {"SAPO_CACHE_DIR": f"{scratch}/cache"}, check=True)
        summary: dict[str, Any] = json.loads(Path(scratch, "run", "summary.json").read_text())
        return summary | {"command_seconds": time.monotonic() - started}


def row(summary: dict[str, Any]) -> str:
    def percent(which: str) -> str:
        return f"{100 * summary[f'{which}_pass_at_1']:.1f} ± {100 * summary[f'{which}_standard_error']:.1f} %"

    ledger = "balances" if summary["ledger_balanced"] else "DOES NOT BALANCE"
    cells = [
        summary["seed"], percent("base"), percent("final"), f"{100 * summary['ceiling_pass_at_1']:.1f} %",
        f"{summary['policy_age_mean']:.2f} / {summary['policy_age_max']}", summary["stale"],
        summary["mixed_version_responses"], f"{summary['sampling_overlap']:.2f}",
        f"{summary['engine_logprob_max_abs_diff']:.1e}", ledger, f"{summary['command_seconds']:.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    seeds = parser.parse_args().seeds
    summaries = [run(seed) for seed in seeds]
    command = f"python benchmarks/demo.py --seeds {' '.join(map(str, seeds))}"
    header = HEADER.format(command=command, samples=summaries[0]["evaluation_samples"], cores=os.cpu_count())
    path = ROOT / "benchmarks" / "results" / "demo.md"
    path.write_text(header + "".join(row(summary) for summary in summaries))
    print(path.read_text())


if __name__ == "__main__":
    main()
