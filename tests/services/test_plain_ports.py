"""Probes that speak no TLS and have no token: their own ports beside control plane and ingest under mutual TLS."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from services import health
from services.control_plane.service import serve as serve_control_plane
from services.ingest.service import serve as serve_ingest
from services.runstore import EmbeddedRedis
from services.runtime.lifecycle import Lifecycle
from services.runtime.settings import Environment, RunConfig
from tests.certificates import Certificates
from tests.small_run import TOKEN, free_address


async def until_ready(address: str) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                if not await health.waiting_for(address, 1.0):
                    return
            except health.SapoError:
                pass
            await asyncio.sleep(0.02)


async def test_probes_need_neither_tls_nor_a_token(
    redis: EmbeddedRedis, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Certificates(tmp_path / "certificates")
    cert, key = made.pair("all")
    files = {"tls_cert": cert, "tls_key": key, "tls_ca": made.ca, "tls_client_ca": made.ca}
    api, probes, rpc, rpc_probes, rpc_health = (free_address() for _ in range(5))
    environment = Environment(
        control_plane_url=f"https://{api}", redis_url=SecretStr(redis.url), token=SecretStr(TOKEN), **files
    )
    lives = [Lifecycle(), Lifecycle()]
    started: list[asyncio.Task[Any]] = [
        asyncio.create_task(serve_control_plane(lives[0], config, environment, listen=api, http_listen=probes)),
        asyncio.create_task(
            serve_ingest(lives[1], environment, listen=rpc, http_listen=rpc_probes, health_listen=rpc_health)
        ),
    ]
    try:
        for address in (f"http://{probes}", f"http://{rpc_probes}", rpc_health):
            await until_ready(address)
        async with httpx.AsyncClient(base_url=f"http://{probes}") as http:
            assert "sapo_policy_version" in (await http.get("/metrics")).text
            assert (await http.get("/v1/status")).status_code == 404, "the API is not there"
            assert (await http.get("/")).status_code == 404
        for refused in (rpc, f"https://{api}", f"http://{api}"):
            with pytest.raises(health.Unavailable):
                await health.waiting_for(refused, 2.0)
        for name, path in files.items():
            monkeypatch.setenv(f"SAPO_{name.upper()}", path)
        assert await health.waiting_for(f"https://{api}", 2.0) == [], "with a certificate"
    finally:
        for life in reversed(lives):
            life.stopping.set()
        await asyncio.gather(*started)
