"""A worker on another host, over a bad network: it joins by addresses and token alone, works, and leaves.

Its host is a network namespace that loses one packet in a hundred, 50 ms away in each direction, and has none of the
run's files. One run; tests read what was seen. A part that this kernel lacks is skipped; the run is done without it.
"""

import asyncio
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import services
from services.run_directory import audit_run
from services.runstore import EmbeddedRedis
from tests.chaos.proxy import Proxy
from tests.other_host import LOST, MOUNTS, NAMESPACE, OtherHost, other_host
from tests.small_run import TOKEN
from tests.system import System, jsonl_run, system

pytestmark = [pytest.mark.timeout(360)]
DELAY = 0.05  # seconds, each way
ROOT = Path(services.__file__).parents[1]


@dataclass
class Seen:
    host: OtherHost
    exit_code: int | None = None
    log: str = ""
    accepted: int = 0
    version: int = -1  # that the worker served in the end
    round_trip: float = 0.0  # of a request to the control plane, in seconds
    packets_lost: int = 0
    reached_directly: bool = True
    files_there: str = "not looked at"
    open_leases_after: int = -1
    audit: Any = None


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, redis: EmbeddedRedis) -> Seen:
    with other_host() as host, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAPO_REDIS_URL", redis.url)
        return asyncio.run(_scenario(host, tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("far"), redis.url))


async def _scenario(host: OtherHost, root: Path, elsewhere: Path, redis_url: str) -> Seen:
    seen = Seen(host)
    config = jsonl_run(
        root / "files", 8, "1", training={"steps": 10_000, "groups_per_step": 2}, sampling={"group_size": 8}
    )
    async with system(config, redis_url, workers=0) as running:
        near = [running.control.url.removeprefix("http://"), running.addresses["grpc"]]
        proxies = [Proxy(_free(host.ours), target, delay=DELAY) for target in near]
        for each in proxies:
            await each.accept()
        try:
            await _work(seen, running, [each.address for each in proxies], root, elsewhere)
            seen.reached_directly = host.reaches(*_parts(near[0]))
            seen.files_there = host.files(root)
            seen.round_trip = await _round_trip(proxies[0].address)
        finally:
            for each in proxies:
                await each.close()
    seen.audit = await audit_run(config.run.directory)
    if host.namespace and LOST not in host.lacking:
        seen.packets_lost = host.lost()
    return seen


async def _work(seen: Seen, running: System, addresses: list[str], root: Path, elsewhere: Path) -> None:
    """Until it has followed the policy for two versions; then it is asked to go."""
    control, ingest = addresses
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(elsewhere), "TMPDIR": str(elsewhere),
        "OMP_NUM_THREADS": "1", "SAPO_CONTROL_PLANE_URL": f"http://{control}", "SAPO_INGEST_ADDRESS": ingest,
        "SAPO_TOKEN": TOKEN, "SAPO_PATIENCE_SECONDS": "60",
    }  # fmt: skip
    worker = await asyncio.create_subprocess_exec(
        *seen.host.command(root), sys.executable, "-m", "services.cli", "serve", "rollout", "--name", "far",
        env=environment, cwd=elsewhere, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(240):
            while seen.version < 2:
                assert worker.returncode is None, (await worker.communicate())[1].decode()
                status = await running.control.status()
                seen.version = max((each["version"] for each in status["workers"]), default=-1)
                await asyncio.sleep(0.1)
            worker.terminate()
            seen.log = (await worker.communicate())[1].decode()
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()
    status = await running.control.status()
    seen.exit_code, seen.accepted = worker.returncode, status["accepted"]
    seen.open_leases_after = status["open_leases"]


def _free(host: str) -> str:
    with socket.socket() as holder:
        holder.bind((host, 0))
        return f"{host}:{holder.getsockname()[1]}"


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


async def _round_trip(address: str) -> float:
    reader, writer = await asyncio.open_connection(*_parts(address))
    started = time.monotonic()
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readline()
    writer.close()
    return time.monotonic() - started


def test_it_joined_and_followed_the_policy(seen: Seen) -> None:
    assert "worker far serves version 0" in seen.log
    assert seen.version >= 2


def test_it_contributed_all_of_the_log(seen: Seen) -> None:
    assert seen.accepted >= 4, "two steps of two groups"


def test_it_left_in_peace_and_holds_nothing(seen: Seen) -> None:
    assert seen.exit_code == 0, seen.log
    assert seen.open_leases_after == 0


def test_I1_the_ledger_balances(seen: Seen) -> None:
    assert seen.audit.balanced, seen.audit.problems


def test_its_answers_took_their_time(seen: Seen) -> None:
    assert seen.round_trip >= 2 * DELAY


def test_it_was_on_another_network(seen: Seen) -> None:
    _require(seen, NAMESPACE)
    assert not seen.reached_directly, "the services listen on the loopback interface of this host alone"


def test_the_network_lost_packets(seen: Seen) -> None:
    _require(seen, LOST)
    assert seen.packets_lost > 0


def test_it_had_none_of_the_runs_files(seen: Seen) -> None:
    _require(seen, MOUNTS)
    assert seen.files_there == ""


def _require(seen: Seen, part: str) -> None:
    """Skip, or in CI fail where no more than a package is missing."""
    if reason := seen.host.lacking.get(part):
        missing = "is not installed" in reason and os.environ.get("CI")
        pytest.fail(f"{part}: {reason}") if missing else pytest.skip(f"{part}: {reason}")
