"""Workers far faster than the learner: sampling must slow down, and nothing may grow, be dropped or be preferred.

    make overload [MINUTES=5]

Two runs of `sapo up` with the same policy. In the first, pacing holds nobody back: how fast the workers can sample
while the learner trains. In the second, pacing is as always: every process, Redis and the disk are measured while it
lasts. Then the learner alone is stopped until the workers have nothing left to do, so that what they sampled and what
the log holds can be compared to the token; it goes on, and the run is stopped as with Ctrl-C and audited.

Writes benchmarks/results/overload.md; exits with 1 when a bar is missed.
"""

import argparse
import asyncio
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.overload_report import Findings, Sample, write_report
from sapo_learner import checkpoint
from sapo_learner.archive import Archive
from sapo_learner.control import GROUP
from services.control_plane.record import read
from services.run_directory import LocalServices, audit_run, live_services
from services.runstore import RunState, RunStore
from services.wire import decode
from tests.end_to_end.conftest import SETTINGS

GROUPS_PER_STEP, GROUP_SIZE, MAX_POLICY_AGE = 16, 8, 4
SAMPLE_SECONDS = 5.0
STOPPED_SHARE = 0.6  # of every second, by SIGSTOP, so that the ratio holds on an idle machine, too
REST_SECONDS = 5.0  # without anything to do, before sampling has come to rest
FREE_SECONDS = 20.0  # of sampling that nothing holds back
START_SECONDS, QUIET_SECONDS, STOP_SECONDS = 300.0, 60.0, 90.0
DISK = ("archive", "snapshots", "checkpoints", "logs", "redis", "record.jsonl")
UNHINDERED = 1_000_000  # steps that sampling may run ahead: more than it can
SETTINGS_HERE: dict[str, Any] = {key: value for key, value in SETTINGS.items() if key.startswith("policy.")} | {
    "run.name": "overload",
    "training.steps": 1_000_000,  # the run ends when its time is over
    "training.groups_per_step": GROUPS_PER_STEP,
    "training.max_policy_age": MAX_POLICY_AGE,
    # As far ahead as the age allows: if pacing let one lease too many through, its tokens would be too old.
    "pacing.lookahead": MAX_POLICY_AGE,
    "pacing.lease_seconds": 5,
    "sampling.group_size": GROUP_SIZE,
    "sampling.max_tokens": 12,
    "optimizer.learning_rate": 1e-4,
    # What makes the learner slow: a forward and a backward pass for each response by itself.
    "training.microbatch_tokens": 1,
    "engine.slots": 512,
    "checkpoint.every": 5,
    "evaluation.every": 1 << 30,
    "evaluation.samples": 1,
    "evaluation.boundary_samples": 1,
    "probe.behaviour_every": 5,
}


@dataclass
class Run:
    """A `sapo up` in a process of its own."""

    directory: Path
    process: "subprocess.Popen[bytes]"
    started: float = field(default_factory=time.monotonic)

    @property
    def services(self) -> LocalServices:
        found = live_services(self.directory)
        if found is None:
            raise RuntimeError("the run's `sapo up` is gone")
        return found

    def pid(self, name: str) -> int:
        return int(self.services.processes[name]["pid"])

    def metrics(self, name: str) -> dict[str, float]:
        """Of one process: sample name, with its label values behind it -> value."""
        text = httpx.get(f"http://{self.services.processes[name]['http']}/metrics", timeout=10).text
        return {
            " ".join([each.name, *each.labels.values()]): each.value
            for family in text_string_to_metric_families(text)
            for each in family.samples
        }

    def of_workers(self) -> dict[str, float]:
        """The workers' metrics, summed."""
        summed: dict[str, float] = {}
        for name in (each for each in self.services.processes if each.startswith("rollout")):
            for key, value in self.metrics(name).items():
                summed[key] = summed.get(key, 0.0) + value
        return summed

    async def state(self) -> RunState:
        async with await RunStore.connect(self.services.redis_url, "overload") as store:
            return await store.state()

    def learner_step(self) -> int:
        return int(self.metrics("learner").get("sapo_learner_step", 0))

    def until(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Poll `condition` until it is true; RuntimeError when the run ends or takes too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"`sapo up` ended while waiting for {what}; its output is above")
            try:
                if condition():
                    return
            except (httpx.TransportError, RuntimeError, OSError):
                pass  # not started yet
            time.sleep(0.2)
        raise RuntimeError(f"no {what} within {seconds:.0f} s")


@contextmanager
def running(directory: Path, **changed: Any) -> Iterator[Run]:
    """`sapo up` until the block ends, then Ctrl-C."""
    settings = SETTINGS_HERE | {key.replace("__", "."): value for key, value in changed.items()}
    arguments = [f"--set={key}={value}" for key, value in {**settings, "run.dir": directory}.items()]
    defaults = directory.with_suffix(".yaml")
    defaults.write_text("policy: {source: tiny}\n")
    command = [sys.executable, "-m", "services.cli", "up", str(defaults), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    run = Run(directory, process)
    try:
        run.until("third optimizer step", lambda: run.learner_step() >= 3, START_SECONDS)
        yield run
        process.send_signal(signal.SIGINT)
        process.wait(STOP_SECONDS)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_SECONDS)


def free_rate(directory: Path) -> float:
    """Tokens per second that the workers sample when pacing holds nobody back, beside a learner that trains."""
    with running(directory, training__max_policy_age=UNHINDERED, pacing__lookahead=UNHINDERED) as run:
        before, started = run.of_workers()["sapo_rollout_tokens_total"], time.monotonic()
        time.sleep(FREE_SECONDS)
        return (run.of_workers()["sapo_rollout_tokens_total"] - before) / (time.monotonic() - started)


def look(run: Run) -> Sample:
    services, state = run.services, asyncio.run(run.state())
    pids = {name: int(each["pid"]) for name, each in services.processes.items()} | {"sapo up": services.supervisor_pid}
    return Sample(
        seconds=time.monotonic() - run.started,
        pids=pids,
        rss={name: psutil.Process(pid).memory_info().rss for name, pid in pids.items()},
        disk={name: _bytes(run.directory / name) for name in DISK},
        redis_used=state.memory_used_bytes,
        unread=state.unread_entries,
        open_leases=len(state.leases),
        reoffered=len(state.reoffered),
        accepted=state.sequence,
        step=run.learner_step(),
        load=os.getloadavg()[0],
    )


def _bytes(path: Path) -> int:
    total = path.stat().st_size if path.is_file() else 0
    for each in path.rglob("*"):
        try:
            total += each.stat().st_size if each.is_file() else 0
        except FileNotFoundError:  # just deleted, as kept files are bounded
            continue
    return total


@contextmanager
def slowed(pid: int) -> Iterator[None]:
    """Stop the process for a part of every second. It runs again when the block ends."""
    over = threading.Event()

    def alternate() -> None:
        with suppress(ProcessLookupError):  # restarted, which the report says
            while not over.is_set():
                os.kill(pid, signal.SIGSTOP)
                over.wait(STOPPED_SHARE)
                os.kill(pid, signal.SIGCONT)
                over.wait(1 - STOPPED_SHARE)

    thread = threading.Thread(target=alternate, name="slowed")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def overload(directory: Path, minutes: float, findings: Findings) -> None:
    """The measured run; fills in what was seen of it while it lasted."""
    with running(directory) as run:
        learner, deadline = run.pid("learner"), time.monotonic() + 60 * minutes
        with slowed(learner):
            while time.monotonic() < deadline:
                findings.samples.append(sample := look(run))
                print(sample.line, flush=True)
                time.sleep(max(0.0, min(SAMPLE_SECONDS, deadline - time.monotonic())))
            findings.samples.append(look(run))
        os.kill(learner, signal.SIGSTOP)
        try:
            run.until("end of all sampling", _at_rest(run), QUIET_SECONDS)
            findings.workers, findings.ingest = run.of_workers(), run.metrics("ingest")
            findings.granted = run.metrics("control-plane")["sapo_leases_granted_total"]
        finally:
            os.kill(learner, signal.SIGCONT)
        run.until("empty stream", lambda: asyncio.run(run.state()).unread_entries == 0, QUIET_SECONDS)


def _at_rest(run: Run) -> Callable[[], bool]:
    """Whether for a while no draw has been open and none accepted: every group that was begun has its ack.

    For a while, because the last policy may just have been published: pacing then lets some more groups through.
    """
    since, accepted = time.monotonic(), -1

    def at_rest() -> bool:
        nonlocal since, accepted
        state = asyncio.run(run.state())
        if state.leases or state.reoffered or state.sequence != accepted:
            since, accepted = time.monotonic(), state.sequence
        return time.monotonic() - since >= REST_SECONDS

    return at_rest


def audit(directory: Path, findings: Findings) -> None:
    """What the archive and the newest checkpoint of the stopped run hold."""
    findings.ledger = asyncio.run(audit_run(directory)).to_dict()
    cursor = checkpoint.load_newest(directory / "checkpoints").state.cursor
    groups = 0
    for entry in Archive(directory / "archive", None).entries():
        if entry.kind != GROUP:
            continue
        group = decode(entry.payload)
        lengths = [len(each.token_ids) for each in group.trajectories]
        findings.logged.extend(lengths)
        if entry.sequence <= cursor:
            findings.consumed.extend(lengths)
            step = groups // GROUPS_PER_STEP  # optimizer steps done before the one that consumed it
            findings.ages.append(step - int(group.oldest_step))
        groups += 1
    findings.recorded = _recorded(directory, steps=len(findings.ages) // GROUPS_PER_STEP)


def _recorded(directory: Path, steps: int) -> tuple[int, int]:
    """Responses and tokens that the learner's own record says its first steps took."""
    lines = {line["step"]: line for line in read(directory / "record.jsonl") if line["kind"] == "step"}
    each = GROUPS_PER_STEP * GROUP_SIZE
    return each * steps, sum(round(each * lines[step]["response_tokens"]) for step in range(1, steps + 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    minutes = parser.parse_args().minutes
    os.environ.pop("SAPO_REDIS_URL", None)
    os.environ["SAPO_TOKEN"] = secrets.token_urlsafe(24)
    findings = Findings(minutes, MAX_POLICY_AGE, GROUP_SIZE, GROUPS_PER_STEP, STOPPED_SHARE)
    with tempfile.TemporaryDirectory(prefix="sapo-overload-") as scratch:
        os.environ["SAPO_CACHE_DIR"] = f"{scratch}/cache"  # both runs begin with the same policy
        print("how fast the workers sample when nothing holds them back", flush=True)
        findings.free_rate = free_rate(Path(scratch, "free"))
        print(f"{findings.free_rate:.0f} tokens/s; now the overload, {minutes:g} minutes", flush=True)
        overload(Path(scratch, "run"), minutes, findings)
        audit(Path(scratch, "run"), findings)
    return 0 if write_report(findings) else 1


if __name__ == "__main__":
    sys.exit(main())
