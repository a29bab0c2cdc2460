"""What the dashboard costs: the memory of a tab that stays open, and the time of a step beside twenty of them.

    make dashboard [MINUTES=10]

1. Memory. A control plane is fed with made-up steps, twenty a second, and a group a second, through its own HTTP API,
   for MINUTES; one tab of a real browser draws all of it, with a group open. JavaScript heap and resident memory of the
   tab's process after forced garbage collections, at a fifth of the time and at its end.
2. Step time. A real run of `sapo up`; beside twenty tabs three times, before, between and after without one. Each time
   counts against the mean of those around it, and the run does not learn: its own pace moves, too. The browser runs on
   the same machine, where it may have the CPU when nobody else wants it: drawing is not what is measured.

Writes benchmarks/results/dashboard.md; exits with 1 when a bar is missed. Needs chromium and playwright.
"""

import argparse
import asyncio
import json
import math
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from playwright.async_api import Page, ViewportSize

from benchmarks.browser import chromium, hold_back, opened, renderers, resident
from benchmarks.machine import machine
from sapo_learner.diagnostics import LOG_RATIO_EDGES
from sapo_learner.ledger import Ledger
from services.control_plane.record import read
from services.run_directory import live_services
from services.runstore import EmbeddedRedis
from services.runtime.auth import page_address
from tests.end_to_end.conftest import SETTINGS
from tests.shown_group import shown_group
from tests.small_run import TOKEN, control_plane, run_config

RESULTS = Path(__file__).parent / "results" / "dashboard.md"
STEPS_PER_SECOND, TABS, ALTERNATIONS = 20, 20, 3
MOST_MEMORY, MOST_STEP_TIME = 1.2, 1.1
LOOKS = 5  # of which the median counts
SETTLE_SECONDS = 5.0  # after tabs have opened, or closed
MIB = 1 << 20
ALL_IN_VIEW: ViewportSize = {"width": 1400, "height": 3600}  # every chart is drawn
RUN = {key: value for key, value in SETTINGS.items() if key.startswith("policy.")} | {
    "run.name": "dashboard", "training.steps": 1_000_000, "training.groups_per_step": 16, "sampling.group_size": 8,
    "sampling.max_tokens": 12, "evaluation.every": 1 << 30, "evaluation.samples": 1, "evaluation.boundary_samples": 1,
    "optimizer.learning_rate": 0,  # steps of one length
}  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Of a tab, in bytes. heap: JavaScript's, after garbage collection. resident: of its process."""

    heap: float
    resident: float


# ---- memory of a tab


def made_up_step(step: int, now: float) -> dict[str, Any]:
    """As long as a real one, every figure in motion."""
    wave = math.sin(step / 50)
    signs = {"all": 0.5 + wave / 9, "positive": 0.5 + wave / 8, "negative": 0.5 - wave / 8}
    names = ("gate", "gate_p10", "gate_p90", "coefficient", "effective_sample_size", "kl", "log_ratio")
    bins = [1 + step % 7 for _ in range(len(LOG_RATIO_EDGES) + 1)]
    histograms = {
        "edges": [*LOG_RATIO_EDGES],
        "tokens": {group: bins for group in ("all", "positive", "negative", "age_0", "age_1")},
        "weight_name": "gate",
        "weight": {sign: [wave for _ in bins] for sign in ("positive", "negative")},
    }
    ages = {f"age_{age}": 0.1 * age for age in range(3)}
    return {
        "kind": "step", "step": step, "started": now - 0.04, "ended": now, "waited_seconds": 0.01, "reward": wave,
        "rewards": {"correct": wave, "overlong": -wave}, "response_tokens": 50 + wave, "stopped": 0.9, "tokens": 1000,
        "outcomes": {"trained": 12, "degenerate": 4, "stale": 0}, "entropy": 1 + wave / 3, "loss": wave,
        "gradient_norm": 1.0, "learning_rate": 1e-4, "log_ratio_std": 0.1, "clamped_fraction": 0.0,
        "policy_age_mean": 2.0, "policy_age_max": 4,
        "diagnostics": {name: signs for name in names} | {"log_ratio_std": ages},
        "seconds": {phase: 0.01 + wave / 999 for phase in ("forward", "backward", "loss", "optimizer", "read")},
        **({"histograms": histograms} if step % STEPS_PER_SECOND == 0 else {}),
    }  # fmt: skip


async def feed(url: str) -> None:
    """Until it is cancelled; never catches up with what it has missed."""
    step, headers = 0, {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as http:
        while True:
            step, begun = step + 1, time.monotonic()
            report = {"state": "training", "step": step, "cursor": 0, "ledger": Ledger().to_dict()}
            await http.post("/v1/learner", json=report | {"record": made_up_step(step, time.time())})
            if step % STEPS_PER_SECOND == 0:
                group = shown_group(f"1-{step}", step=step, responses=8, tokens=60)
                await http.post("/v1/groups", json=group.model_dump())
            await asyncio.sleep(max(0.0, 1 / STEPS_PER_SECOND - (time.monotonic() - begun)))


async def look(page: Page) -> Memory:
    """The median of some."""
    session, found = await page.context.new_cdp_session(page), []
    for _ in range(LOOKS):
        for _ in range(2):
            await session.send("HeapProfiler.collectGarbage")
        heap = (await session.send("Runtime.getHeapUsage"))["usedSize"]
        found.append(Memory(heap, max(map(resident, renderers()), default=0)))
        await asyncio.sleep(1)
    await session.detach()
    return Memory(*(statistics.median(getattr(each, name) for each in found) for name in ("heap", "resident")))


async def memory(minutes: float) -> tuple[Memory, Memory, int]:
    """At a fifth of the time and at its end; and the steps until then."""
    with tempfile.TemporaryDirectory() as name, EmbeddedRedis(Path(name) / "redis") as redis:
        async with control_plane(run_config(Path(name) / "run"), redis.url) as running, chromium() as browser:
            feeding = asyncio.create_task(feed(running.url))
            begun = time.monotonic()
            context = await browser.new_context(viewport=ALL_IN_VIEW)
            page = await opened(context, page_address(running.url, TOKEN))
            await page.locator("#group-rows button").first.click()
            await asyncio.sleep(max(0.0, minutes * 12 - (time.monotonic() - begun)))
            early = await look(page)
            await asyncio.sleep(max(0.0, minutes * 60 - (time.monotonic() - begun)))
            late = await look(page)
            steps = running.plane.learner.step
            if feeding.done():
                feeding.result()
            feeding.cancel()
    return early, late, steps


# ---- time of a step


def steps_since(directory: Path, when: float) -> tuple[int, float]:
    """How many steps ended since then, and how long after each other, in seconds."""
    ended = [
        line["ended"] for line in read(directory / "record.jsonl") if line["kind"] == "step" and line["ended"] > when
    ]
    return len(ended), (ended[-1] - ended[0]) / (len(ended) - 1) if len(ended) > 1 else math.nan


@dataclass(frozen=True)
class StepTimes:
    """Seconds per step. alone: before, between and after the windows of `beside`."""

    alone: list[float]
    beside: list[float]

    @property
    def ratios(self) -> list[float]:
        around = [statistics.mean(pair) for pair in pairwise(self.alone)]
        return [beside / alone for beside, alone in zip(self.beside, around, strict=True)]


async def step_times(minutes: float) -> StepTimes:
    window = minutes * 60 / (2 * ALTERNATIONS + 2)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "run"
        (Path(name) / "run.yaml").write_text("policy: {source: tiny}\n")
        settings = [f"--set={key}={value}" for key, value in {**RUN, "run.dir": directory}.items()]
        command = [sys.executable, "-m", "services.cli", "up", str(Path(name) / "run.yaml"), *settings]
        environment = os.environ | {"SAPO_TOKEN": secrets.token_hex(8)}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        try:
            await until_training(directory, process)
            times = StepTimes([await measured(directory, window)], [])
            for _ in range(ALTERNATIONS):
                times.beside.append(await beside_tabs(directory, window))
                times.alone.append(await measured(directory, window))
                print(
                    f"seconds per step beside {TABS} tabs: {times.beside[-1]:.4f}; alone: {times.alone[-2:]}",
                    flush=True,
                )
            return times
        finally:
            process.send_signal(signal.SIGINT)
            await asyncio.to_thread(process.wait, 90)


async def until_training(directory: Path, process: "subprocess.Popen[bytes]") -> None:
    async with asyncio.timeout(600):
        while steps_since(directory, 0)[0] < 10:
            if process.poll() is not None:
                raise SystemExit("`sapo up` ended before it had trained")
            await asyncio.sleep(1)


async def beside_tabs(directory: Path, window: float) -> float:
    services = live_services(directory)
    assert services is not None
    async with chromium() as browser:
        for _ in range(TABS):  # each as in a browser of its own: one opens six connections to a server
            await opened(await browser.new_context(), page_address(services.control_plane_url, services.token))
        hold_back()
        await asyncio.sleep(SETTLE_SECONDS)
        beside = await measured(directory, window)
    await asyncio.sleep(SETTLE_SECONDS)
    return beside


async def measured(directory: Path, window: float) -> float:
    begun = time.time()
    await asyncio.sleep(window)
    return steps_since(directory, begun)[1]


# ---- report


def report(minutes: float, command: str, tab: tuple[Memory, Memory, int], times: StepTimes) -> tuple[str, bool]:
    early, late, steps = tab
    heap, size = late.heap / early.heap, late.resident / early.resident
    slower = statistics.median(times.ratios)
    good = max(heap, size) <= MOST_MEMORY and slower <= MOST_STEP_TIME
    rows = "\n".join(
        f"| {before:.4f} | {beside:.4f} | {after:.4f} | {ratio:.3f} |"
        for (before, after), beside, ratio in zip(pairwise(times.alone), times.beside, times.ratios, strict=True)
    )
    return (
        f"""# What the dashboard costs

    {command}

{datetime.now(UTC):%Y-%m-%d}, {machine()}.

## Verdict: {"every bar is met" if good else "a bar is missed"}

| bar | met | figures |
|---|---|---|
| a tab's memory after {minutes:g} minutes at most {MOST_MEMORY} times that after {minutes / 5:g} | \
{"yes" if max(heap, size) <= MOST_MEMORY else "NO"} | heap {heap:.2f}, resident {size:.2f} times |
| a step beside {TABS} tabs at most {MOST_STEP_TIME} times as long, median of {ALTERNATIONS} | \
{"yes" if slower <= MOST_STEP_TIME else "NO"} | {slower:.3f} times |

## Memory of a tab

{steps} made-up steps, {steps / minutes / 60:.1f} a second, and a group a second; every chart in view, a group open.

| MiB | after {minutes / 5:g} minutes | after {minutes:g} |
|---|---|---|
| JavaScript heap, after garbage collection | {early.heap / MIB:.1f} | {late.heap / MIB:.1f} |
| resident, the tab's process | {early.resident / MIB:.0f} | {late.resident / MIB:.0f} |

## Time of a step

A run of the built-in tiny policy, 16 groups of 8 responses, learning rate 0; the browser on the same machine, held
back (SCHED_IDLE) once its pages are open.

| seconds per step, no tab | beside {TABS} tabs | then no tab | times the mean of the two |
|---|---|---|---|
{rows}
""",
        good,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of the memory part, and of the other (default 10)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    tab = asyncio.run(memory(arguments.minutes))
    print(json.dumps({"early": vars(tab[0]), "late": vars(tab[1]), "steps": tab[2]}), flush=True)
    times = asyncio.run(step_times(arguments.minutes))
    text, good = report(arguments.minutes, f"make dashboard MINUTES={arguments.minutes:g}", tab, times)
    arguments.out.write_text(text)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
