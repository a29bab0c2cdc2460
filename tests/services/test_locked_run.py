"""A run with every lock on: roles, mutual TLS, and everything exchanged while it goes on and strangers knock."""

import asyncio
import secrets
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from sapo_learner.errors import Unauthenticated
from services.run_directory import audit_run
from services.runstore import EmbeddedRedis
from services.runtime import seldom, watched
from services.runtime.client import ControlPlaneClient
from services.runtime.roles import GRPC
from services.runtime.tls import SCHEME, Tls
from tests.certificates import Certificates
from tests.system import System, jsonl_run, system

pytestmark = [pytest.mark.timeout(300)]
ROLE = {"control": "viewer", "ingest": "viewer", "learner": "learner", "rollout": "worker", "viewer": "viewer"}
"""Of the token that each service sends: ingest only asks for the configuration."""


class Locks:
    """Files of tokens and certificates, as a deployment mounts them."""

    def __init__(self, directory: Path) -> None:
        self._directory, self.made = directory, Certificates(directory / "certificates")
        self.tokens: dict[str, str] = {}
        self.exchange()

    def exchange(self) -> None:
        """Other tokens and other certificates everywhere; of the old tokens none counts any more."""
        self.tokens = {role: secrets.token_hex(16) for role in ("viewer", "worker", "learner")}
        lines = "".join(f"{role}: {token}\n" for role, token in self.tokens.items())
        (self._directory / "tokens").write_text(lines)
        for role, token in self.tokens.items():
            (self._directory / role).write_text(token)
        for service in ROLE:
            self.made.pair(service)

    def environment(self, service: str) -> dict[str, Any]:
        certificate = self._directory / "certificates" / service
        return {
            "token_file": str(self._directory / ROLE[service]),
            "tokens_file": str(self._directory / "tokens"),
            "tls_cert": f"{certificate}.pem",
            "tls_key": f"{certificate}.key",
            "tls_ca": self.made.ca,
            "tls_client_ca": self.made.ca,
        }


async def knock(running: System, locks: Locks) -> list[str]:
    """What strangers get to hear, and that nobody is let in."""
    http, rpc = running.addresses["control-plane"], running.addresses["grpc"]
    ours = Tls(*locks.made.pair("stranger"), ca=locks.made.ca)
    heard = []
    for url, context in (
        (f"http://{http}", None),
        (SCHEME + http, ssl.create_default_context(cafile=locks.made.ca)),
        (SCHEME + http, Tls(*locks.made.pair("old", days=-1), ca=locks.made.ca).client_context()()),
    ):
        async with httpx.AsyncClient(base_url=url, verify=context or True) as client:
            with pytest.raises(httpx.TransportError):
                await client.get("/v1/status")
    for authorization in ({}, {"Authorization": "Bearer wrong"}):
        async with httpx.AsyncClient(base_url=SCHEME + http, verify=ours.client_context()()) as client:
            answer = await client.get("/v1/status", headers=authorization)
            heard.append(str(answer.status_code))
    async with httpx.AsyncClient(base_url=SCHEME + http, verify=ours.client_context()()) as client:
        worker = {"Authorization": f"Bearer {locks.tokens['worker']}"}
        heard.append(str((await client.post("/v1/policies", headers=worker, json={})).status_code))
    for address, tls, token in (
        (rpc, Tls(), locks.tokens["worker"]),
        (SCHEME + rpc, Tls(ca=locks.made.ca), locks.tokens["worker"]),
        (SCHEME + rpc, Tls(*locks.made.pair("old", days=-1), ca=locks.made.ca), locks.tokens["worker"]),
        (SCHEME + rpc, ours, "wrong"),
        (SCHEME + rpc, ours, locks.tokens["learner"]),
    ):
        heard.append(await _call(address, tls, token))
    return heard


async def _call(address: str, tls: Tls, token: str) -> str:
    async with tls.channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.stream_stream(next(iter(GRPC)))(metadata=(("authorization", f"Bearer {token}"),))
        with suppress(grpc.aio.AioRpcError):
            await call.read()
        return str((await call.code()).name)


async def test_a_run_goes_on_while_locks_are_exchanged_and_strangers_knock(
    tmp_path: Path, redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SAPO_REDIS_URL", redis.url)
    monkeypatch.setattr(watched, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(seldom, "NOTE_SECONDS", 0.0)
    locks = Locks(tmp_path)
    config = jsonl_run(tmp_path / "files", 8, "1", training={"steps": 16, "groups_per_step": 2})
    async with system(config, redis.url, secured=locks.environment) as running:
        exchanged_at, before, heard = None, locks.tokens, list[str]()
        async with asyncio.timeout(240):
            while (status := await running.control.status())["state"] != "finished":
                for task in running.tasks.values():
                    if task.done():
                        task.result()
                step = status["learner"]["step"]
                if exchanged_at is None and step >= 1:
                    locks.exchange()
                    exchanged_at = step
                    heard = await knock(running, locks)
                await asyncio.sleep(0.05)
        assert exchanged_at is not None
        assert exchanged_at + 6 < config.training.steps, "most was sampled after the exchange"
        for token in before.values():
            url = SCHEME + running.addresses["control-plane"]
            tls = Tls(*locks.made.pair("stranger"), ca=locks.made.ca)
            async with ControlPlaneClient(url, token, tls=tls, patience=5) as late:
                with pytest.raises(Unauthenticated):
                    await late.config()
    refused = ["UNAVAILABLE"] * 3 + ["UNAUTHENTICATED", "PERMISSION_DENIED"]
    assert heard == ["401", "401", "403", *refused]
    report = await audit_run(config.run.directory)
    assert report.balanced, report.problems
    for said in (
        "no TLS: it speaks no TLS", "no TLS: it has no certificate", "no TLS: its certificate has expired",
        "HTTP refused 127.0.0.1: Authorization header: wrong or missing token",
        "HTTP refused 127.0.0.1: POST /v1/policies: a token of role worker may not do this",
        "gRPC refused 127.0.0.1: Authorization header: wrong or missing token",
        "a token of role learner may not do this", "the token of this stream counts no more",
    ):  # fmt: skip
        assert said in caplog.text
    for token in (*before.values(), *locks.tokens.values()):
        assert token not in caplog.text
