"""Ingest over real gRPC, beside a control plane and a real run store."""

from collections.abc import AsyncIterator

import pytest_asyncio

from services.runstore import EmbeddedRedis
from tests.ingest_door import Ingest, open_ingest
from tests.small_run import Running

MAX_MESSAGE_BYTES = 1 << 20


@pytest_asyncio.fixture
async def ingest(running: Running, redis: EmbeddedRedis) -> AsyncIterator[Ingest]:
    async with open_ingest(running.config, redis.url, max_message_bytes=MAX_MESSAGE_BYTES) as opened:
        yield opened
