"""The process around the control plane: two of them, a lost Redis, a taken port, and its end."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr

from sapo_learner.errors import ConfigError, Fenced, Unavailable
from services.control_plane import plane as plane_module
from services.control_plane.service import serve
from services.runstore import EmbeddedRedis, RunStore
from services.runtime import api
from services.runtime.client import ControlPlaneClient
from services.runtime.http import _bind, parse_address
from services.runtime.lifecycle import Lifecycle, first_cause
from services.runtime.settings import Environment, RunConfig, load_config
from tests.small_run import TOKEN, Learner, Running, answer, control_plane, free_address, lease_request, run_config


class Process:
    """`sapo serve control-plane`, in this process."""

    def __init__(self, config: RunConfig, redis: EmbeddedRedis, address: str) -> None:
        self.lifecycle, self.address = Lifecycle(), address
        environment = Environment(redis_url=SecretStr(redis.url), token=SecretStr(TOKEN))
        self.task = asyncio.create_task(serve(self.lifecycle, config, environment, listen=address))

    async def ready(self) -> "Process":
        async with asyncio.timeout(10):
            while self.lifecycle.waiting_for:
                assert not self.task.done(), self.task
                await asyncio.sleep(0.005)
        return self

    async def end(self) -> BaseException | None:
        """What it ended with."""
        async with asyncio.timeout(10):
            (result,) = await asyncio.gather(self.task, return_exceptions=True)
        return None if result is None else first_cause(result)

    async def stop(self) -> BaseException | None:
        self.lifecycle.stopping.set()
        return await self.end()


@asynccontextmanager
async def process(config: RunConfig, redis: EmbeddedRedis) -> AsyncIterator[Process]:
    started = Process(config, redis, free_address())
    try:
        yield await started.ready()
    finally:
        await started.stop()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plane_module, "WATCH_SECONDS", 0.01)


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.005)


async def test_it_serves_until_it_is_asked_to_stop_and_then_ends_in_peace(
    redis: EmbeddedRedis, config: RunConfig
) -> None:
    async with process(config, redis) as started:
        async with ControlPlaneClient(f"http://{started.address}", TOKEN) as client:
            assert client.run == "", "not known yet"
            assert await client.config() == config
            await client.status()  # which does not say it
            assert client.run == f"{config.run.name}-{(config.run.directory / 'run.id').read_text()}"
        assert load_config(config.run.directory / "run.yaml") == config
        assert await started.stop() is None


async def test_the_older_of_two_exits_with_a_clear_message_and_the_newer_serves(
    redis: EmbeddedRedis, config: RunConfig
) -> None:
    async with process(config, redis) as older, process(config, redis) as newer:
        error = await older.end()
        assert isinstance(error, Fenced)
        assert "a newer writer" in str(error)
        assert "stop this process" in str(error)
        async with ControlPlaneClient(f"http://{newer.address}", TOKEN) as client:
            assert (await client.status())["run"] == config.run.name


async def test_who_asks_the_older_one_is_told_to_try_again_and_not_that_it_is_fenced_itself(
    running: Running, learner: Learner
) -> None:
    manifest = await learner.upload(1)
    await running.store.acquire_token("control-plane")
    running.client.patience = 0.1
    with pytest.raises(Unavailable, match="a newer control plane has taken over"):
        await running.client.lease(lease_request())
    with pytest.raises(Unavailable, match="a newer control plane has taken over"):
        await running.client.publish(learner.request(manifest))
    assert (await running.store.state()).published_version == 0


async def test_an_older_one_that_would_mend_redis_leaves_it_to_the_newer(running: Running, learner: Learner) -> None:
    await running.store.acquire_token("control-plane")
    await running.store._command("DEL", "registry")
    with pytest.raises(Unavailable, match="a newer control plane has taken over"):
        await running.plane.policies.reconcile(await running.store.state())


async def test_the_newer_one_wins_also_when_redis_forgot_how_many_there_were(
    redis: EmbeddedRedis, config: RunConfig
) -> None:
    async with process(config, redis) as older, await RunStore.connect(redis.url, config.run.name) as store:
        await store._redis.flushall()
        async with process(config, redis):
            assert isinstance(await older.end(), Fenced)


async def test_a_taken_port_is_said_before_the_running_one_is_fenced_off(
    redis: EmbeddedRedis, config: RunConfig
) -> None:
    async with process(config, redis) as first:
        error = await Process(config, redis, first.address).end()
        assert isinstance(error, ConfigError)
        assert str(error) == f"{first.address}: another process listens there (stop it, or choose another address)"
        async with ControlPlaneClient(f"http://{first.address}", TOKEN) as client:
            learner = api.LearnerReport.model_validate((await client.status())["learner"])
            await client.learner_report(learner)  # which is written under its token
        assert not first.task.done()


async def test_a_port_that_is_only_reserved_is_free(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        with _bind(f"127.0.0.1:{holder.getsockname()[1]}") as listener:
            # asyncio turns Nagle's algorithm off only for sockets that name their protocol.
            assert listener.proto == socket.IPPROTO_TCP


@pytest.mark.parametrize("address", ["8080", ":8080", "localhost", "localhost:http", "localhost:65536", ""])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        parse_address(address, where="--listen")
    assert parse_address("[::1]:80", where="") == ("::1", 80)


async def test_a_redis_that_is_emptied_in_mid_run_is_told_again(redis: EmbeddedRedis, tmp_path: Path) -> None:
    config = run_config(tmp_path, task={"held_out_every": 25}, evaluation={"boundary_samples": 200})
    async with control_plane(config, redis.url) as running:
        learner = await Learner(running).start()
        watch = asyncio.create_task(running.plane.watch(running.lifecycle))
        chunk = (await running.client.lease(lease_request("w", 0, evaluate=True))).evaluation
        assert chunk
        await running.client.evaluated(answer(chunk))
        await learner.report("training", 2, cursor=0)
        facts = await running.store.facts()
        saved = await running.store.documents("evaluations")
        await running.store._redis.flushall()

        async def restored() -> bool:
            return bool((await running.store.state()).registry_restored and await running.store.documents("learner"))

        await until(restored)
        assert await running.store.versions() == {0: 0}
        assert await running.store.facts() == facts
        assert await running.store.documents("evaluations") == saved
        running.lifecycle.stopping.set()
        await watch


async def test_a_redis_that_is_away_makes_it_unready_and_its_return_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        config = run_config(tmp_path / "run")
        async with control_plane(config, server.url) as running:
            running.plane._store.timeout = 0.05
            watch = asyncio.create_task(running.plane.watch(running.lifecycle))
            server.kill()
            async with asyncio.timeout(10):
                while not running.lifecycle.waiting_for:
                    await asyncio.sleep(0.005)
            assert "Redis at" in running.lifecycle.waiting_for[0]
            server.start()
            async with asyncio.timeout(10):
                while running.lifecycle.waiting_for:
                    await asyncio.sleep(0.005)
            assert not watch.done()
            running.lifecycle.stopping.set()
            await watch


async def test_leases_of_dead_workers_are_swept_even_if_nobody_asks(redis: EmbeddedRedis, tmp_path: Path) -> None:
    config = run_config(tmp_path, pacing={"lease_seconds": 0.05})
    async with control_plane(config, redis.url) as running:
        await Learner(running).start()
        await running.client.lease(lease_request(count=2))
        watch = asyncio.create_task(running.plane.watch(running.lifecycle))

        async def swept() -> bool:
            return len((await running.store.state()).reoffered) == 2

        await until(swept)
        running.lifecycle.stopping.set()
        await watch


async def test_another_run_of_the_same_name_is_refused_before_it_touches_anything(
    redis: EmbeddedRedis, config: RunConfig, tmp_path: Path
) -> None:
    """The default name is "run", and a directory may be deleted: neither may mix two runs in one Redis."""
    async with process(config, redis) as started:
        assert await started.stop() is None
    async with process(config, redis) as again:
        assert await again.stop() is None
    elsewhere = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(tmp_path / "elsewhere")})})
    error = await Process(elsewhere, redis, free_address()).end()
    assert isinstance(error, ConfigError)
    assert f"another run of the name {config.run.name!r} is kept there" in str(error)
    assert "choose another run.name" in error.fix
    async with await RunStore.connect(redis.url, config.run.name) as store:
        await store.erase()
    after = Process(elsewhere, redis, free_address())
    await after.ready()
    assert await after.stop() is None
