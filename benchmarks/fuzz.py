"""Ten minutes of coverage-guided fuzzing (atheris) of everything that decodes what a worker sends.

    make fuzz MINUTES=10

Seeds are valid groups; half of the mutations know the message's structure (`tests/mutated_groups.py`), half are
libFuzzer's. Any exception but our refusal or protobuf's is a finding, and so is an input that takes ten seconds or more
than 2 GB. The summary goes to benchmarks/results/fuzz.md, the input of a finding into benchmarks/results/fuzz-findings.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from benchmarks.machine import machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FINDINGS = RESULTS / "fuzz-findings"
COVERED = ("services.wire", "services.wire_shape", "sapo_learner.trajectory")
SEEDS, INPUT_SECONDS, MEMORY_MB, LARGEST = 200, 10, 2048, 1 << 16


def fuzz(arguments: list[str]) -> None:
    """In a process of its own, which libFuzzer ends, and which has not imported yet what is to be instrumented."""
    import atheris

    with atheris.instrument_imports(include=list(COVERED)):
        from tests.mutated_groups import decode_all, mutated, seed

    from google.protobuf.message import DecodeError

    from protos.sapo.v1.trajectory_pb2 import TrajectoryGroup

    def structured(data: bytes, max_size: int, number: int) -> bytes:
        random = Random(number)
        try:
            message = TrajectoryGroup.FromString(data)
        except DecodeError:
            message = seed(random)
        if number % 2:
            return bytes(atheris.Mutate(data, max_size))
        return mutated(message, random)[:max_size]

    def one(data: bytes) -> None:
        decode_all(data)

    atheris.Setup([sys.argv[0], *arguments], one, custom_mutator=structured)
    atheris.Fuzz()


def main() -> None:
    from tests.mutated_groups import seed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    started = time.monotonic()
    FINDINGS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as corpus:
        for number in range(SEEDS):
            Path(corpus, f"seed-{number}").write_bytes(seed(Random(number)).SerializeToString())
        command = [
            sys.executable, "-m", "benchmarks.fuzz", "--child", corpus, f"-max_total_time={given.minutes * 60:.0f}",
            f"-max_len={LARGEST}", f"-timeout={INPUT_SECONDS}", f"-rss_limit_mb={MEMORY_MB}", f"-seed={given.seed}",
            f"-artifact_prefix={FINDINGS}/", "-print_final_stats=1",
        ]  # fmt: skip
        ran = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    sys.stdout.write(ran.stdout[-4000:])
    _report(ran, time.monotonic() - started)
    if not any(FINDINGS.iterdir()):
        FINDINGS.rmdir()
    raise SystemExit(ran.returncode)


def _report(ran: "subprocess.CompletedProcess[str]", seconds: float) -> None:
    """benchmarks/results/fuzz.md; nothing is claimed of a run that did not say how many inputs it tried."""
    figures = dict(re.findall(r"stat::(\w+):\s+(\d+)", ran.stdout))
    if "number_of_executed_units" not in figures:
        raise SystemExit("the fuzzer did not run to its end: nothing is written")
    coverage = re.findall(r"cov: (\d+) ft: (\d+)", ran.stdout)[-1]
    found = sorted(path.name for path in FINDINGS.iterdir())
    lines = [
        "# Fuzzing of the wire", "",
        f"{machine()}. {seconds / 60:.1f} minutes of atheris (`make fuzz`), one core.", "",
        "| | |", "|---|---|",
        f"| inputs tried | {int(figures['number_of_executed_units']):,} |",
        f"| a second | {figures['average_exec_per_sec']} |",
        f"| inputs that reached something new | {int(figures['new_units_added']):,} |",
        f"| edges and features reached | {coverage[0]} and {coverage[1]} |",
        f"| largest memory of the process | {figures['peak_rss_mb']} MB |",
        f"| slowest input | {figures['slowest_unit_time_sec']} s |",
        f"| findings | {', '.join(found) or 'none'} |", "",
        "A finding is an exception that is neither a refusal of ours nor protobuf's, an accepted group that does not",
        f"come back as it was, {INPUT_SECONDS} s or {MEMORY_MB} MB for one input. Covered: "
        f"{', '.join(f'`{each}`' for each in COVERED)}.",
    ]  # fmt: skip
    (RESULTS / "fuzz.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        fuzz(sys.argv[2:])
    else:
        main()
