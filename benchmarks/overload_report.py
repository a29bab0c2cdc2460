"""What benchmarks/overload.py found, as a table with a verdict."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

RESULTS = Path(__file__).parent / "results" / "overload.md"
RATIO = 10.0  # workers over learner
FLAT = 0.05  # growth from the second to the last fifth that still counts as none
MIB, KIB = 1 << 20, 1 << 10
HEADER = """\
# Workers faster than the learner

    {command}

{date}, {machine}; the machine's load meanwhile, others' work included: {load}.

A whole `sapo up` with two workers. Each optimizer step takes {step_groups} groups of {group_size} responses, and
pacing lets sampling run as far ahead as `max_policy_age` = {max_age} allows. The learner is slow because it works on
one response at a time (`training.microbatch_tokens: 1`) and is stopped (SIGSTOP) for {stopped:.0%} of every second.

When pacing holds nobody back, the workers sample {free:,.0f} tokens/s beside a learner that trains and is not
stopped. In the measured {minutes:g} minutes the learner consumed {trained:,.0f} tokens/s (trained, or without signal):
the workers are **{ratio:.1f} times** as fast. They sampled {accepted} groups, the learner did {steps} steps.
"""
GROWTH = """
## Memory and disk

Median of the second and of the last fifth of the time; a sample every five seconds.

| what | second fifth | last fifth | growth | most |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Sample:
    """One look at the run. Sizes in bytes; load: of the machine, over the last minute."""

    seconds: float
    pids: dict[str, int]
    rss: dict[str, int]
    disk: dict[str, int]
    redis_used: int
    unread: int
    open_leases: int
    reoffered: int
    accepted: int
    step: int
    load: float

    @property
    def line(self) -> str:
        resident = ", ".join(f"{name} {size / MIB:.0f}" for name, size in self.rss.items())
        return (
            f"{self.seconds:6.0f} s  step {self.step}, accepted {self.accepted}, unread {self.unread}, open leases "
            f"{self.open_leases}, Redis {self.redis_used / KIB:.0f} KiB, MiB: {resident}; load {self.load:.1f}"
        )


@dataclass
class Findings:
    """workers, ingest: metrics when sampling had come to rest. logged, consumed: tokens per response of all groups in
    the log, and of those that steps have taken; recorded: responses and tokens that the learner says it took. ages: in
    steps, of each consumed group's oldest token. free_rate: tokens per second that nothing holds back."""

    minutes: float
    max_policy_age: int
    group_size: int
    groups_per_step: int
    stopped_share: float
    free_rate: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    workers: dict[str, float] = field(default_factory=dict)
    ingest: dict[str, float] = field(default_factory=dict)
    granted: float = 0.0
    ledger: dict[str, Any] = field(default_factory=dict)
    logged: list[int] = field(default_factory=list)
    consumed: list[int] = field(default_factory=list)
    recorded: tuple[int, int] = (0, 0)
    ages: list[int] = field(default_factory=list)

    @property
    def trained_rate(self) -> float:
        """Tokens of consumed groups per second, from the first to the last sample."""
        first, last = self.samples[0], self.samples[-1]
        return (last.step - first.step) * self.groups_per_step * self._tokens_per_group / (last.seconds - first.seconds)

    @property
    def _tokens_per_group(self) -> float:
        return self.group_size * statistics.mean(self.consumed)

    @property
    def ratio(self) -> float:
        return self.free_rate / self.trained_rate


def fifths(samples: Sequence[Sample], value: Callable[[Sample], float]) -> tuple[float, float]:
    """Median of the second and of the last fifth."""
    size = max(1, len(samples) // 5)
    second, last = samples[size : 2 * size] or samples, samples[-size:]
    return statistics.median(map(value, second)), statistics.median(map(value, last))


@dataclass(frozen=True)
class _Series:
    """A quantity over time. must_be_flat: it is memory, or disk that configuration bounds."""

    name: str
    value: Callable[[Sample], float]
    must_be_flat: bool
    unit: int = 1

    def growth(self, samples: Sequence[Sample]) -> float:
        second, last = fifths(samples, self.value)
        return (last - second) / second if second else 0.0 if not last else math.inf

    def row(self, samples: Sequence[Sample]) -> str:
        second, last = (f"{each / self.unit:,.1f}" for each in fifths(samples, self.value))
        most = f"{max(map(self.value, samples)) / self.unit:,.1f}"
        return f"| {self.name} | {second} | {last} | {100 * self.growth(samples):+.1f} % | {most} |\n"


def all_series(samples: Sequence[Sample]) -> list[_Series]:
    def of(fields: str, key: str) -> Callable[[Sample], float]:
        return lambda each: float(getattr(each, fields)[key])

    disk = samples[0].disk
    return [
        *(_Series(f"RSS of {name}, MiB", of("rss", name), True, MIB) for name in samples[0].rss),
        _Series("Redis used_memory, KiB", lambda each: each.redis_used, True, KIB),
        *(_Series(f"disk: {name}, KiB", of("disk", name), name in ("snapshots", "checkpoints"), KIB) for name in disk),
        _Series("stream length, groups", lambda each: each.unread, False),
        _Series("open leases", lambda each: each.open_leases, False),
    ]


def bars(findings: Findings) -> list[tuple[str, bool, str]]:
    """Each bar: what it says, whether it is met, with which figures."""
    samples, ledger = findings.samples, findings.ledger
    growing = [each.name for each in all_series(samples) if each.must_be_flat and each.growth(samples) > FLAT]
    acks = _by_status(findings.ingest, "sapo_ingest_acks_total")
    final = _by_status(findings.workers, "sapo_rollout_groups_total")
    groups = len(findings.logged) // findings.group_size
    dropless = set(acks) == set(final) == {"accepted"} and acks["accepted"] == final["accepted"] == groups
    restarted = len({tuple(each.pids.values()) for each in samples}) > 1
    oldest = max(findings.ages)
    responses, tokens = (int(findings.workers[f"sapo_rollout_response_tokens_{each}"]) for each in ("count", "sum"))
    logged = len(findings.logged), sum(findings.logged)
    return [
        (f"workers at least {RATIO:g} times as fast", findings.ratio >= RATIO, f"{findings.ratio:.1f} times"),
        ("no process was restarted", not restarted, "process ids changed" if restarted else "the same process ids"),
        (f"memory, snapshots and checkpoints flat within {100 * FLAT:g} %", not growing, ", ".join(growing) or "all"),
        ("nothing dropped", dropless, f"ingest: {_counts(acks)}; workers: {_counts(final)}; log: {groups}"),
        ("no draw was given up and sampled again", findings.granted == groups,
         f"{findings.granted:.0f} leases granted for {groups} groups"),
        (f"no consumed token older than {findings.max_policy_age} steps", oldest <= findings.max_policy_age,
         f"oldest {oldest}, mean of the groups' oldest {statistics.mean(findings.ages):.2f}"),
        ("`stale == 0`", ledger["stale"] == 0, f"stale {ledger['stale']}"),
        ("ledger balances", ledger["balanced"], "; ".join(ledger["problems"]) or _counts(
            {key: ledger[key] for key in ("accepted", "trained", "degenerate", "backlog", "open")})),
        ("every response that was sampled whole is in the log", (responses, tokens) == logged,
         f"{responses:,} with {tokens:,} tokens sampled, {logged[0]:,} with {logged[1]:,} in the log"),
        ("trained responses are as long as sampled ones", *_unbiased(findings)),
    ]  # fmt: skip


def _unbiased(findings: Findings) -> tuple[bool, str]:
    """What the learner took is all that was sampled but the newest, which pacing bounds: length chooses nothing."""
    taken, newest = findings.consumed, findings.logged[len(findings.consumed) :]
    ahead = (findings.max_policy_age + 1) * findings.groups_per_step * findings.group_size
    said = (
        f"mean of all sampled {statistics.mean(findings.logged):.4f} tokens, of those consumed "
        f"{statistics.mean(taken):.4f}; between them, to the token, the log's newest {len(newest):,} responses "
        f"({statistics.mean(newest or [0]):.4f}), which no step had taken yet"
    )
    return findings.recorded == (len(taken), sum(taken)) and len(newest) <= ahead, said


def _by_status(metrics: dict[str, float], name: str) -> dict[str, float]:
    """The values of one metric by its only label."""
    return {
        key.removeprefix(f"{name} "): value for key, value in metrics.items() if value and key.startswith(f"{name} ")
    }


def _counts(counts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.0f}" for name, value in counts.items()) or "none"


def write_report(findings: Findings) -> bool:
    """Write and print the report; returns whether every bar is met."""
    samples, judged = findings.samples, bars(findings)
    loads = [each.load for each in samples]
    text = HEADER.format(
        command=f"make overload MINUTES={findings.minutes:g}", date=datetime.now(UTC).date(), machine=machine(),
        load=f"{min(loads):.1f} to {max(loads):.1f}", step_groups=findings.groups_per_step,
        group_size=findings.group_size,
        stopped=findings.stopped_share, max_age=findings.max_policy_age, free=findings.free_rate,
        minutes=findings.minutes, trained=findings.trained_rate, ratio=findings.ratio,
        accepted=findings.ledger["accepted"], steps=samples[-1].step,
    )  # fmt: skip
    met = all(ok for _, ok, _ in judged)
    text += (
        "\n## Verdict: "
        + ("every bar is met" if met else "A BAR IS MISSED")
        + "\n\n| bar | met | figures |\n|---|---|---|\n"
    )
    text += "".join(f"| {bar} | {'yes' if ok else '**NO**'} | {figures} |\n" for bar, ok, figures in judged)
    text += GROWTH + "".join(each.row(samples) for each in all_series(samples))
    text += (
        "\nThe archive and the record grow with the run by design. Redis rewrites its file when that reaches 64 MiB.\n"
    )
    RESULTS.write_text(text)
    print(text)
    return met
