"""Every call that crosses a process, against a peer that accepts the connection and never answers.

Each must end within its time limit with an Unavailable that names the peer. The tables hold every public call of the
clients: one that is added without a line here fails the first test.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydantic import SecretStr

from protos.sapo.v1 import ingest_pb2 as pb
from sapo_learner.archive import Head
from sapo_learner.errors import Unavailable
from sapo_learner.manifest import Blob
from services import health
from services.control_plane.service import serve as serve_control_plane
from services.ingest.service import serve as serve_ingest
from services.learner.service import serve as serve_learner
from services.rollout.sender import GroupSender
from services.rollout.service import serve as serve_rollout
from services.runstore import Pacing, RunStore
from services.runtime import api
from services.runtime.client import UPLOAD_FACTOR, ControlPlaneClient
from services.runtime.lifecycle import Lifecycle, first_cause
from services.runtime.settings import Environment
from tests.small_run import heartbeat, lease_request, run_config

LIMIT = 0.1  # seconds that each call may take for an answer
BOUND = 5.0  # the same, with room for a busy machine
pytestmark = pytest.mark.timeout(60)


class SilentPeer:
    """Accepts, reads, and says nothing; or says `begins` first."""

    def __init__(self) -> None:
        self.begins = b""
        self.connections = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> "SilentPeer":
        self._server = await asyncio.start_server(self._silence, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()

    async def _silence(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        await reader.read(1 << 16)
        writer.write(self.begins)
        while await reader.read(1 << 16):
            pass


@pytest_asyncio.fixture
async def peer() -> AsyncIterator[SilentPeer]:
    async with SilentPeer() as silent:
        yield silent


@pytest.fixture
def blob(tmp_path: Path) -> Blob:
    (tmp_path / "blob").write_bytes(b"weights")
    return Blob.of(tmp_path / "blob")


async def _events(client: ControlPlaneClient) -> None:
    async for _ in client.events():
        pass


def shown_group() -> api.ShownGroup:
    facts = dict.fromkeys(("task", "prompt_id", "worker", "engine", "estimator", "objective"), "x")
    prompt = {"text": None, "tokens": 1}
    return api.ShownGroup.model_validate(
        {"entry": "1-1", "step": 1, "draw": 0, **facts, "weight": "gate", "prompt": prompt, "responses": []}
    )


# What each call is given; "blob" and "directory" stand for the fixtures.
HTTP: dict[str, Callable[[ControlPlaneClient, Blob, Path], Awaitable[Any]]] = {
    "config": lambda client, *_: client.config(),
    "status": lambda client, *_: client.status(),
    "ledger": lambda client, *_: client.ledger(),
    "lease": lambda client, *_: client.lease(lease_request()),
    "release": lambda client, *_: client.release(api.ReleaseRequest(worker="w", leases=[])),
    "heartbeat": lambda client, *_: client.heartbeat(heartbeat()),
    "evaluated": lambda client, *_: client.evaluated(
        api.ChunkResult(worker="w", evaluation="e", chunk=0, version=0, correct=[], samples=1, tokens=0)
    ),
    "learner_report": lambda client, *_: client.learner_report(
        api.LearnerReport(state="training", step=0, cursor=0, ledger={})
    ),
    "show": lambda client, *_: client.show(shown_group()),
    "publish": lambda client, *_: client.publish(api.PublishRequest(token=1, manifest={})),
    "manifest": lambda client, *_: client.manifest(),
    "versions": lambda client, *_: client.versions(),
    "upload": lambda client, blob, directory: client.upload(directory / "blob", blob),
    "download": lambda client, blob, directory: client.download(blob, directory / "here"),
    "events": lambda client, *_: _events(client),
}

PACING = Pacing(
    groups_per_step=1, lookahead=0, max_policy_age=0, steps=1, lease_seconds=1.0, max_lease_seconds=1.0
)  # fmt: skip
REDIS: dict[str, Callable[[RunStore], Awaitable[Any]]] = {
    "append": lambda store: store.append(0, 1, b"payload", max_entries=1, max_bytes=100),
    "refuse": lambda store: store.refuse("w", 0, 1),
    "append_control": lambda store: store.append_control(1, "config", b"payload"),
    "read": lambda store: store.read(0, 1, 100),
    "trim": lambda store: store.trim(1, Head()),
    "needs_rebuild": lambda store: store.needs_rebuild(Head()),
    "rebuild": lambda store: store.rebuild(1, Head(), []),
    "set_uncounted": lambda store: store.set_uncounted(1, 0),
    "grant": lambda store: store.grant(1, "w", 1, 0, PACING),
    "renew": lambda store: store.renew("w", [(0, 1, 1)]),
    "release": lambda store: store.release("w", [(0, 1)]),
    "restore_registry": lambda store: store.restore_registry(1, []),
    "publish": lambda store: store.publish(1, 0, "digest", "{}"),
    "current": lambda store: store.current(),
    "manifest": lambda store: store.manifest(0),
    "versions": lambda store: store.versions(),
    "forget": lambda store: store.forget(0),
    "set_facts": lambda store: store.set_facts(1, {"a": "b"}),
    "facts": lambda store: store.facts(),
    "save_document": lambda store: store.save_document(1, "collection", "id", "{}"),
    "delete_document": lambda store: store.delete_document(1, "collection", "id"),
    "documents": lambda store: store.documents("collection"),
    "heartbeat": lambda store: store.heartbeat("w", "{}", 1.0),
    "workers": lambda store: store.workers(),
    "acquire_token": lambda store: store.acquire_token("learner"),
    "claim": lambda store: store.claim("id"),
    "ping": lambda store: store.ping(LIMIT),
    "state": lambda store: store.state(),
    "erase": lambda store: store.erase(),
    "open_draws": lambda store: store.open_draws(),
    "open_leases": lambda store: store.open_leases(),
}


def _public_calls(kind: type) -> set[str]:
    return {
        name
        for name, member in inspect.getmembers(kind)
        if (inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)) and not name.startswith("_")
    }


def test_every_call_of_the_clients_is_walked_through() -> None:
    assert set(HTTP) == _public_calls(ControlPlaneClient)
    assert set(REDIS) == _public_calls(RunStore) - {"close", "connect"}


async def _unavailable(call: Awaitable[Any], address: str) -> Unavailable:
    async with asyncio.timeout(BOUND):
        with pytest.raises(Unavailable) as raised:
            await call
    assert address in str(raised.value)
    return raised.value


@pytest.mark.parametrize("name", sorted(HTTP))
async def test_http(name: str, peer: SilentPeer, blob: Blob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "EVENT_SECONDS", LIMIT)
    (tmp_path / "here").mkdir()
    async with ControlPlaneClient(f"http://{peer.address}", "token", patience=LIMIT) as client:
        await _unavailable(HTTP[name](client, blob, tmp_path), peer.address)
    assert peer.connections, "it was really asked"


@pytest.mark.parametrize("name", ["config", "download", "events"])
async def test_http_that_stops_in_the_middle_of_an_answer(
    name: str, peer: SilentPeer, blob: Blob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "EVENT_SECONDS", LIMIT)
    (tmp_path / "here").mkdir()
    kind = b"text/event-stream" if name == "events" else b"application/json"
    peer.begins = b"HTTP/1.1 200 OK\r\nContent-Type: " + kind + b"\r\nContent-Length: 100\r\n\r\n{"
    async with ControlPlaneClient(f"http://{peer.address}", "token", patience=LIMIT) as client:
        await _unavailable(HTTP[name](client, blob, tmp_path), peer.address)


async def test_an_upload_that_is_not_answered(peer: SilentPeer, blob: Blob, tmp_path: Path) -> None:
    peer.begins = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"  # it has no such blob; to PUT it says nothing
    async with ControlPlaneClient(f"http://{peer.address}", "token", patience=LIMIT / UPLOAD_FACTOR) as client:
        await _unavailable(client.upload(tmp_path / "blob", blob), peer.address)


@pytest.mark.parametrize("name", sorted(REDIS))
async def test_redis(name: str, peer: SilentPeer) -> None:
    store = RunStore(f"redis://{peer.address}/0", "run", timeout=LIMIT)
    try:
        error = await _unavailable(REDIS[name](store), peer.address)
    finally:
        await store.close()
    assert "SAPO_REDIS_URL" in error.fix
    assert peer.connections


async def test_connecting_to_redis(peer: SilentPeer) -> None:
    reasons: list[str | None] = []
    connecting = RunStore.connect(f"redis://{peer.address}/0", "run", timeout=0.1, patience=0.4, waiting=reasons.append)
    await _unavailable(connecting, peer.address)
    assert reasons
    assert all(peer.address in str(reason) for reason in reasons)


async def test_ingest_s_stream_is_given_up_for_a_new_one(peer: SilentPeer) -> None:
    sender = GroupSender(peer.address, "token", pb.Hello(worker="w"), answer_seconds=0.05, patience=LIMIT)
    await _unavailable(sender.run(), peer.address)
    assert peer.connections >= 1


async def test_health(peer: SilentPeer) -> None:
    await _unavailable(health.waiting_for(f"http://{peer.address}", LIMIT), peer.address)
    await _unavailable(health.waiting_for(peer.address, LIMIT), peer.address)


async def test_a_question_from_the_terminal(peer: SilentPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PATIENCE_SECONDS", LIMIT)
    monkeypatch.setenv("SAPO_TOKEN", "token")
    await _unavailable(health.ask(f"http://{peer.address}", lambda control: control.status()), peer.address)


class Noting(Lifecycle):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def wait_for(self, name: str, reason: str) -> None:
        self.said.append(reason)
        super().wait_for(name, reason)


@pytest.mark.parametrize("service", ["control-plane", "ingest", "learner", "rollout"])
async def test_a_service_says_what_it_waits_for_and_then_gives_up(
    service: str, peer: SilentPeer, tmp_path: Path
) -> None:
    environment = Environment(
        control_plane_url=f"http://{peer.address}",
        ingest_address=peer.address,
        redis_url=SecretStr(f"redis://{peer.address}/0"),
        token=SecretStr("token"),
        patience_seconds=LIMIT,
    )
    lifecycle = Noting()
    any_port = "127.0.0.1:0"
    task = asyncio.ensure_future(
        {
            "control-plane": lambda: serve_control_plane(lifecycle, run_config(tmp_path), environment, listen=any_port),
            "ingest": lambda: serve_ingest(lifecycle, environment, listen=any_port, http_listen=any_port),
            "learner": lambda: serve_learner(lifecycle, environment, http_listen=any_port),
            "rollout": lambda: serve_rollout(lifecycle, environment, name="w", http_listen=any_port),
        }[service]()
    )
    await asyncio.wait([task], timeout=BOUND)
    error = first_cause(task.exception()) if task.done() and task.exception() else None  # type: ignore[arg-type]
    assert isinstance(error, Unavailable), error
    assert peer.address in str(error)
    assert any(peer.address in reason for reason in lifecycle.said), lifecycle.said
