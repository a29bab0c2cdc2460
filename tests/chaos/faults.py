"""What is done to a run. Each fault returns what it did, when its cause is over; from then on recovery counts.

A fault also checks what must hold while it lasts (an older writer is refused and says so, a group sent again is a
duplicate) and raises ChaosFailure otherwise. Faults need a run that goes on when they begin.
"""

import asyncio
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import grpc
import psutil
import redis.asyncio

from protos.sapo.v1 import ingest_pb2 as pb
from protos.sapo.v1 import ingest_pb2_grpc as pb_grpc
from sapo_learner.archive import Archive
from sapo_learner.control import GROUP
from sapo_learner.errors import Fenced
from sapo_learner.trajectory import SCHEMA_VERSION, TrajectoryGroup
from services.wire import decode, to_message
from tests.chaos.harness import LEASE_SECONDS, ChaosFailure, ChaosRun

Fault = Callable[[ChaosRun, random.Random], Awaitable[str]]
KILLED = ("learner", "ingest", "control-plane", "rollout", "redis")
PEERS = ("control-plane", "ingest", "redis")
SETTLED = (pb.Ack.STATUS_DUPLICATE, pb.Ack.STATUS_EXPIRED)
RESENT, RESENT_FROM = 24, 96
REFUSED_SAYS = re.compile(r"newer|token \d+")
CHECKPOINT_SAYS, ARCHIVE_SAYS = b"training waits until there is room", b"reading stops until there is room"


# ---- processes


async def kill(name: str, run: ChaosRun, rng: random.Random) -> str:
    child = run.children[_one_of_them(name, run, rng)]
    await run.until(f"process of {child.name}", lambda: child.pid)
    process = child.process
    process.kill()
    await process.wait()
    return f"kill -9 of {child.name}"


async def stop_worker(run: ChaosRun, rng: random.Random) -> str:
    """Until its leases have run out and others sample its draws."""
    child = run.children[_one_of_them("rollout", run, rng)]
    pid, seconds = child.pid, LEASE_SECONDS + rng.uniform(0.5, 2.0)
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
        async with run.store() as store:

            async def expired() -> bool:  # swept by the next look at the leases
                mine = [lease for lease in await store.open_leases() if lease.worker == child.name]
                return all(lease.remaining_seconds < 0 or lease.age_seconds < seconds / 2 for lease in mine)

            await run.until(f"end of the leases of {child.name}", expired)
    finally:
        os.kill(pid, signal.SIGCONT)
    return f"SIGSTOP of {child.name} for {seconds:.1f} s"


async def second(name: str, run: ChaosRun, rng: random.Random, *, asleep: bool) -> str:
    """Start another `name` by hand. It takes over; the first is refused, is restarted, and takes over again.

    asleep: the first is stopped meanwhile and learns of it when it wakes.
    """
    first = run.children[name].process
    before = await _token(name, run)
    if asleep:
        os.kill(first.pid, signal.SIGSTOP)
    command = list(run.children[name].command)
    command[command.index("--listen" if "--listen" in command else "--http-listen") + 1] = "127.0.0.1:0"
    log = run.log_of(f"second-{name}")
    process = run.by_hand(log.stem, command)
    try:
        await run.until(f"takeover by a second {name}", partial(_is_newer, name, run, before))
        if asleep:
            await asyncio.sleep(rng.uniform(0, 1.0))
            os.kill(first.pid, signal.SIGCONT)
        await run.until(f"end of the first {name}", lambda: first.returncode is not None)
        _expect_refused(f"the first {name}", first.returncode, run.log_of(name))
        await run.until(f"end of the second {name}", lambda: process.poll() is not None)
        _expect_refused(f"the second {name}", process.returncode, log)
    finally:
        if first.returncode is None:
            os.kill(first.pid, signal.SIGCONT)
        _end(process)
    return f"second {name}" + (" while the first was stopped" if asleep else "") + "; each was refused in turn"


async def _is_newer(name: str, run: ChaosRun, before: int) -> bool:
    return await _token(name, run) > before


async def _token(name: str, run: ChaosRun) -> int:
    """Of the newest writer of this role."""
    if name == "control-plane":
        return int((run.directory / "control-plane.token").read_text())
    async with run.store() as store:
        return (await store.state()).learner_token


def _expect_refused(who: str, code: int, log: Path) -> None:
    last = log.read_text(errors="replace").splitlines()[-8:]
    if code != Fenced.exit_code or not any(REFUSED_SAYS.search(line) for line in last):
        raise ChaosFailure(f"{who} ended with exit code {code}, not as one that was replaced:\n" + "\n".join(last))


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


def _one_of_them(name: str, run: ChaosRun, rng: random.Random) -> str:
    return rng.choice([each for each in run.children if each.startswith("rollout")]) if name == "rollout" else name


# ---- connections


async def cut(peer: str, run: ChaosRun, rng: random.Random) -> str:
    """Reset every connection; new ones are refused for a while, or not."""
    seconds = rng.choice([0.0, rng.uniform(0.5, 3.0)])
    proxy = run.proxies[peer]
    proxy.refuse()
    proxy.cut()
    await asyncio.sleep(seconds)
    await proxy.accept()
    return f"connections to {peer} cut, refused for {seconds:.1f} s"


async def silence(peer: str, run: ChaosRun, rng: random.Random) -> str:
    """Nothing passes for a while; then it all does, or the connections are reset."""
    seconds, reset = rng.uniform(1.0, 4.0), rng.random() < 0.5
    proxy = run.proxies[peer]
    proxy.silence()
    try:
        await asyncio.sleep(seconds)
        if reset:
            proxy.cut()
    finally:
        proxy.speak()
    return f"{peer} silent for {seconds:.1f} s" + (", then reset" if reset else "")


async def send_again(run: ChaosRun, rng: random.Random) -> str:
    """Groups that were acknowledged and archived: each must be refused as settled."""
    manifest = await run.control.manifest()
    fresh = await run.until("archived groups to send again", partial(_archived, run))
    groups = rng.sample(fresh, min(RESENT, len(fresh)))
    hello = pb.Hello(
        worker="chaos", tokenizer_digest=manifest.tokenizer_digest, model_digest=manifest.model_digest,
        schema_version=SCHEMA_VERSION,
    )  # fmt: skip
    async with grpc.aio.insecure_channel(run.ingest_address) as channel, asyncio.timeout(30):
        stub = pb_grpc.TrajectoryIngestServiceStub(channel)
        call = stub.StreamTrajectoryGroups(metadata=(("authorization", f"Bearer {run.token}"),))
        await call.write(pb.StreamTrajectoryGroupsRequest(hello=hello))
        await call.read()
        for group in groups:
            await call.write(pb.StreamTrajectoryGroupsRequest(group=to_message(group)))
            ack = (await call.read()).ack
            if ack.status not in SETTLED:
                raise ChaosFailure(f"draw {group.draw}, accepted before, was answered {pb.Ack.Status.Name(ack.status)}")
        call.cancel()
    return f"{len(groups)} archived groups sent again: each refused"


async def _archived(run: ChaosRun) -> list[TrajectoryGroup]:
    """Groups from the archive's end whose policy versions will be known for another step or more."""
    versions = sorted(await run.control.versions())[1:]

    def read() -> list[TrajectoryGroup]:
        archive = Archive(run.directory / "archive", None)
        entries = archive.read(max(0, archive.head.sequence - RESENT_FROM), RESENT_FROM)
        groups = [decode(entry.payload) for entry in entries if entry.kind == GROUP]
        return [each for each in groups if all(s.version in versions for r in each.trajectories for s in r.spans)]

    return await asyncio.to_thread(read)


# ---- disks


async def full_checkpoint(run: ChaosRun, rng: random.Random) -> str:
    """With room for a snapshot still: without one, sampling would stop before a checkpoint is due."""
    limit = max(path.stat().st_size for path in (run.directory / "checkpoints").glob("step-*/optimizer.safetensors"))
    return await _learner_full(run, rng, limit - 1, CHECKPOINT_SAYS, "a checkpoint")


async def full_archive(run: ChaosRun, rng: random.Random) -> str:
    """Not before the segment has outgrown the log, which must still tell of it."""
    log = run.log_of("learner")

    def segment() -> int:
        return max((run.directory / "archive").glob("segment-*.zst"), key=os.path.getmtime).stat().st_size

    await run.until("growth of the archive", lambda: segment() > log.stat().st_size + 4096)
    return await _learner_full(run, rng, segment() + 1, ARCHIVE_SAYS, "the archive")


async def _learner_full(run: ChaosRun, rng: random.Random, limit: int, says: bytes, what: str) -> str:
    log, process = run.log_of("learner"), psutil.Process(run.children["learner"].pid)
    seen, (_, hard) = log.stat().st_size, process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (limit, hard))
    try:
        await run.until(f"word of the full disk under {what}", lambda: says in log.read_bytes()[seen:])
        seconds = rng.uniform(0.5, 3.0)
        await asyncio.sleep(seconds)
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, (hard, hard))
    return f"disk full under {what} for {seconds:.1f} s"


async def full_redis(run: ChaosRun, rng: random.Random) -> str:
    """The server ends itself, as it must when its file cannot grow; the disk has room again when it is restarted."""
    child = run.children["redis"]
    server, process = child.process, psutil.Process(child.pid)
    file = max(_append_only(run).glob("*.incr.aof"), key=os.path.getmtime)
    process.rlimit(psutil.RLIMIT_FSIZE, (file.stat().st_size + 1, psutil.RLIM_INFINITY))
    await run.until("end of a Redis whose disk is full", lambda: server.returncode is not None)
    return "disk full under Redis, until it ended"


# ---- a Redis that lost something


async def emptied(run: ChaosRun, rng: random.Random) -> str:
    async with redis.asyncio.Redis.from_url(run.redis.url) as client:
        await client.flushall()
    return "Redis emptied (FLUSHALL)"


async def rolled_back(run: ChaosRun, rng: random.Random) -> str:
    """To a copy of its files, taken some steps before."""
    copy = run.directory / "older-redis"
    await run.until("whole copy of Redis' files", partial(asyncio.to_thread, _copied, _append_only(run), copy))
    moment, seconds = time.time(), rng.uniform(0.5, 2.0)
    await asyncio.sleep(seconds)
    await run.until("step after the copy", lambda: run.first_step_after(moment))

    def replace() -> None:
        shutil.rmtree(_append_only(run))
        copy.rename(_append_only(run))

    run.before_spawn["redis"] = replace
    os.kill(run.children["redis"].pid, signal.SIGKILL)
    await run.until("restart of Redis on older files", lambda: "redis" not in run.before_spawn)
    return f"Redis rolled back by {time.time() - moment:.1f} s"


def _copied(source: Path, target: Path) -> bool:
    """Whether nothing was renamed meanwhile: a file that was growing is cut short, and loaded as far as it goes."""
    shutil.rmtree(target, ignore_errors=True)
    (manifest,) = source.glob("*.manifest")
    before = manifest.read_bytes()
    try:
        shutil.copytree(source, target)
    except (shutil.Error, FileNotFoundError):
        return False
    return manifest.read_bytes() == before


def _append_only(run: ChaosRun) -> Path:
    return run.redis.directory / "appendonlydir"


KILLS: dict[str, Fault] = {f"kill {name}": partial(kill, name) for name in KILLED}
FAULTS: dict[str, Fault] = KILLS | {
    "worker stopped until its leases expired": stop_worker,
    "learner stopped while a second one took over": partial(second, "learner", asleep=True),
    "control plane stopped while a second one took over": partial(second, "control-plane", asleep=True),
    "second learner": partial(second, "learner", asleep=False),
    "second control plane": partial(second, "control-plane", asleep=False),
    **{f"connections to {peer} cut": partial(cut, peer) for peer in PEERS},
    **{f"{peer} silent": partial(silence, peer) for peer in PEERS},
    "acknowledged groups sent again": send_again,
    "disk full under a checkpoint": full_checkpoint,
    "disk full under the archive": full_archive,
    "disk full under Redis": full_redis,
    "Redis emptied": emptied,
    "Redis rolled back": rolled_back,
}
FORGETTING = ("Redis emptied", "Redis rolled back")  # they take with them what nobody has archived, as they must
REDIS_DIES = ("kill redis", "disk full under Redis")
# Over at once, so that another can follow before the run has recovered.
QUICK = (*KILLS, *(f"connections to {peer} cut" for peer in PEERS))
