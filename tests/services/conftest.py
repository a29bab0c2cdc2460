"""One real Redis for the tests of the services; every test has a run of its own."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from services.runstore import EmbeddedRedis
from services.runtime.settings import RunConfig
from tests.small_run import Learner, Running, control_plane, run_config


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return run_config(tmp_path)


@pytest_asyncio.fixture
async def running(config: RunConfig, redis: EmbeddedRedis) -> AsyncIterator[Running]:
    async with control_plane(config, redis.url) as started:
        yield started


@pytest_asyncio.fixture
async def learner(running: Running) -> Learner:
    """Has published version 0."""
    return await Learner(running).start()
