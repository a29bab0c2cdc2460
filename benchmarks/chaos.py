"""What a run survives: kills of every process, and every other fault of tests/chaos, with seconds until it goes on.

    make chaos [SEED=0] [KILLS=200] [MODE=all|kills|faults|short] [FSYNC=always|everysec]

kills    kill -9 of all five processes, equally often, at random moments; with FSYNC=everysec of Redis alone
faults   every other kind of fault, three times, and a kill of each process among them
short    the twenty faults of `make test`
all      kills, then faults, then kills of Redis with everysec; this and kills write benchmarks/results/chaos.md

Exits with 1 when something was lost, duplicated or skipped, or when a run did not go on by itself.
"""

import argparse
import asyncio
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.machine import machine
from tests.chaos.campaign import Outcome, Strike, campaign, full_plan, kill_plan, redis_plan, short_plan
from tests.chaos.harness import DELAY_SECONDS, NICE, WORKERS, ChaosFailure, Fsync

RESULTS = Path(__file__).parent / "results" / "chaos.md"
FAULTS_PER_RUN = 50
MEDIAN_SECONDS, MAX_SECONDS = 10, 30
COLUMNS = "| fault | count | lost | duplicated | skipped | recovery, median s | recovery, max s | restarts |\n"
HEADER = """\
# What a run survives

    {command}

{date}, {machine}. Each run is a whole `sapo up` (six processes, {workers} of them workers, at nice {nice}) behind TCP
proxies, ingest {delay} s away. When its faults are over it is drained, taken up again and finished, and then held
against its ledger, its draws, every acknowledgement that ingest gave, and a replay of its archive.

Lost: groups that ingest acknowledged as accepted and that are not in the archive. Duplicated: draws accepted twice.
Skipped: draws never accepted. Recovery: from the end of the fault's cause until every process is ready again and an
optimizer step has been done, without a hand. Bars: median under {median} s, maximum under {maximum} s.
"""


@dataclass
class Section:
    """Runs that belong in one table."""

    title: str
    fsync: Fsync
    planned: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def table(self) -> str:
        struck = [each for outcome in self.outcomes for each in outcome.struck]
        lost = [count for outcome in self.outcomes for count in outcome.lost]
        verdicts = [outcome.verdict for outcome in self.outcomes]
        duplicated, skipped = sum(len(v.duplicated) for v in verdicts), sum(len(v.skipped) for v in verdicts)
        rows = []
        for name in sorted({each.fault for each in struck}):
            which = [index for index, each in enumerate(struck) if each.fault == name]
            cells = [name, len(which), sum(lost[index] for index in which)]
            cells += ["?" if total else 0 for total in (duplicated, skipped)]  # of a run, not of a fault
            rows.append(_row([*cells, *_recovery([struck[index] for index in which])]))
        rows.append(_row(["**all**", len(struck), sum(lost), duplicated, skipped, *_recovery(struck)]))
        steps, draws = sum(v.steps for v in verdicts), sum(v.draws for v in verdicts)
        said = f"{len(struck)}/{self.planned} recoveries without a hand, in {len(self.outcomes)} runs of together "
        said += f"{steps} steps and {draws} draws, replayed to the same weights. {self._bars(struck)}\n"
        wrong = [f"- {each}\n" for each in [*self.failures, *(p for o in self.outcomes for p in o.problems)]]
        title = f"\n## {self.title}\n\n"
        return (
            title + COLUMNS + "|---" * COLUMNS.count(" | ") + "|---|\n" + "".join(rows) + "\n" + said + "".join(wrong)
        )

    def _bars(self, struck: Sequence) -> str:  # type: ignore[type-arg]
        if not struck:
            return "Nothing was measured."
        slowest = max(struck, key=lambda each: each.recovery_seconds)
        median = statistics.median(each.recovery_seconds for each in struck)
        if median < MEDIAN_SECONDS and slowest.recovery_seconds < MAX_SECONDS:
            return "Both bars are met."
        return f"A bar is missed; the slowest recovery, {slowest.recovery_seconds:.1f} s, followed: {slowest.did}."

    @property
    def clean(self) -> bool:
        return not self.failures and not any(outcome.problems for outcome in self.outcomes)


def _recovery(struck: Sequence) -> list[object]:  # type: ignore[type-arg]
    seconds = [each.recovery_seconds for each in struck] or [0.0]
    return [f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}", sum(each.restarts for each in struck)]


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def attack(section: Section, strikes: Sequence[Strike], seed: int, mode: str) -> None:
    """One run; its outcome, or why it had none, goes into the section."""
    section.planned += len(strikes)
    repeat = f"make chaos MODE={mode} SEED={seed} KILLS={len(strikes)} FSYNC={section.fsync}"
    print(f"{section.title}: {len(strikes)} faults, seed {seed}", flush=True)
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {line}", flush=True)

    with tempfile.TemporaryDirectory(prefix="sapo-chaos-", ignore_cleanup_errors=True) as scratch:
        try:
            outcome = asyncio.run(campaign(Path(scratch), strikes, seed=seed, fsync=section.fsync, say=say))
        except ChaosFailure as failure:
            section.failures.append(f"seed {seed}: {str(failure).splitlines()[0]} (`{repeat}`)")
            print(f"{failure}\nthis repeats it: {repeat}", flush=True)
            return
    section.outcomes.append(outcome)
    if outcome.problems:
        print("\n".join([*outcome.problems, f"this repeats it: {repeat}"]), flush=True)


def kills(section: Section, count: int, seed: int) -> Section:
    plan = kill_plan if section.fsync == "always" else redis_plan
    for index, done in enumerate(range(0, count, FAULTS_PER_RUN)):
        attack(section, plan(seed + index, min(FAULTS_PER_RUN, count - done)), seed + index, "kills")
    return section


def sections(mode: str, fsync: Fsync, count: int, seed: int) -> Iterator[Section]:
    """Each when its runs are over."""
    titles = {"always": "Kills, appendfsync always", "everysec": "Kills of Redis, appendfsync everysec"}
    if mode in ("all", "kills"):
        yield kills(Section(titles[fsync], fsync), count, seed)
    if mode != "kills":
        section = Section("Faults of every kind", fsync)
        attack(section, (short_plan if mode == "short" else full_plan)(seed), seed, mode)
        yield section
    if mode == "all":
        yield kills(Section(titles["everysec"], "everysec"), max(5, count // 5), seed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--mode", choices=["all", "kills", "faults", "short"], default="all")
    parser.add_argument("--fsync", choices=["always", "everysec"], default="always")
    chosen = parser.parse_args()
    logging.basicConfig(level="ERROR")
    os.environ.pop("SAPO_REDIS_URL", None)
    command = f"make chaos MODE={chosen.mode} SEED={chosen.seed} KILLS={chosen.kills} FSYNC={chosen.fsync}"
    text = HEADER.format(
        command=command, date=datetime.now(UTC).date(), machine=machine(), workers=WORKERS, nice=NICE,
        delay=DELAY_SECONDS, median=MEDIAN_SECONDS, maximum=MAX_SECONDS,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="sapo-chaos-base-") as cache:
        os.environ["SAPO_CACHE_DIR"] = cache
        clean = True
        for section in sections(chosen.mode, chosen.fsync, chosen.kills, chosen.seed):
            text += section.table()
            clean &= section.clean
            if chosen.mode in ("all", "kills"):
                RESULTS.write_text(text)
    print(text)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
