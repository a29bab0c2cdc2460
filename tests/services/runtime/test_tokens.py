"""Tokens in files: what may stand there, and that they can be exchanged while both ends run."""

import asyncio
import hashlib
import logging
import math
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Response

from sapo_learner.errors import ConfigError, Unauthenticated
from sapo_learner.manifest import Blob
from services.runtime import auth, seldom, watched
from services.runtime.auth import Credential, Tokens
from services.runtime.client import ControlPlaneClient
from services.runtime.http import Door, serving
from services.runtime.metrics import IngestMetrics
from services.runtime.roles import Role
from services.runtime.seldom import Refusals
from services.runtime.settings import Environment

OLD, NEW = "the-old-token-of-the-run", "the-new-token-of-the-run"


@pytest.fixture(autouse=True)
def at_every_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "LOOK_SECONDS", 0.0)


def role(tokens: Tokens, token: str) -> Role | None:
    return tokens.role(f"Bearer {token}".encode())


def test_a_file_holds_several_tokens_of_each_role(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# the run's\n\nworker: {OLD}\n worker:{NEW}  \nviewer: {OLD}-2\n")
    tokens = Tokens.in_file(str(path))
    assert [role(tokens, each) for each in (OLD, NEW, f"{OLD}-2")] == [Role.WORKER, Role.WORKER, Role.VIEWER]
    assert [role(tokens, each) for each in ("", OLD[:-1], f"{OLD} ", f"worker: {OLD}")] == [None] * 4
    assert tokens.role(OLD.encode()) is None, "without Bearer"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no token in it"),
        ("# worker: x", "no token in it"),
        (OLD, r"line 1: not `ROLE: TOKEN` \(roles are viewer, worker, learner, admin"),
        (f"\nworkers: {OLD}", "line 2: not `ROLE: TOKEN`"),
        ("worker: short", "line 1: a token has at least 16 printable ASCII characters"),
        ("worker: sixteen-letters-ü-and-more", "line 1: a token has"),
        (f"worker: {OLD} {NEW}", "line 1: a token has"),
        (f"worker: {OLD}\nviewer: {OLD}", "a token stands there twice"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_without_what_stands_in_it(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"{path}.*{says}") as caught:
        Tokens.in_file(str(path))
    assert OLD not in str(caught.value)


def test_a_changed_file_counts_at_once_and_a_broken_one_never(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "tokens"
    path.write_text(f"worker: {OLD}")
    tokens = Tokens.in_file(str(path))
    path.write_text(f"worker: {NEW}")
    assert (role(tokens, OLD), role(tokens, NEW)) == (None, Role.WORKER)
    assert f"read again, for it has changed: {path}" in caplog.text
    others = unusable()
    path.write_text("worker: ")
    assert role(tokens, NEW) is Role.WORKER
    assert unusable() == others + 1
    path.unlink()
    assert role(tokens, NEW) is role(tokens, NEW) is Role.WORKER
    assert unusable() == others + 1
    path.write_text(f"worker: {NEW}")
    assert role(tokens, NEW) is Role.WORKER
    assert unusable() == others
    said = [each.message for each in caplog.records if each.levelno == logging.ERROR]
    assert len(said) == 2, "each fault once"
    assert all("what was read before stays in force" in each for each in said)
    assert OLD not in caplog.text
    assert NEW not in caplog.text


def unusable() -> float:
    return IngestMetrics().registry.get_sample_value("sapo_unusable_secret_files") or 0.0


def test_a_file_is_looked_at_once_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "LOOK_SECONDS", 1.0)
    clock = [0.0]
    monkeypatch.setattr(watched.time, "monotonic", lambda: clock[0])
    path = tmp_path / "tokens"
    path.write_text(f"worker: {OLD}")
    tokens = Tokens.in_file(str(path))
    path.write_text(f"worker: {NEW}")
    clock[0] = 0.9
    assert role(tokens, NEW) is None
    clock[0] = 1.0
    assert role(tokens, NEW) is Role.WORKER


def environment(**fields: str) -> Environment:
    return Environment.model_validate(fields)


def test_where_the_tokens_come_from(tmp_path: Path) -> None:
    one, many = tmp_path / "token", tmp_path / "tokens"
    one.write_text(f"{OLD}\n")
    many.write_text(f"worker: {NEW}")
    assert environment(token_file=str(one)).credential().header == f"Bearer {OLD}"
    assert role(environment(token_file=str(one)).tokens(), OLD) is Role.ADMIN
    assert role(environment(token="short").tokens(), "short") is Role.ADMIN, "as ever"
    both = environment(token=OLD, tokens_file=str(many))
    assert both.credential().token == OLD
    assert (role(both.tokens(), OLD), role(both.tokens(), NEW)) == (None, Role.WORKER), "the file alone decides"
    for asked in (environment().credential, environment().tokens):
        with pytest.raises(ConfigError, match="SAPO_TOKEN: not set"):
            asked()
    for asked in (environment(token=OLD, token_file=str(one)).credential,) * 2:
        with pytest.raises(ConfigError, match="SAPO_TOKEN and SAPO_TOKEN_FILE: both are set"):
            asked()
    with pytest.raises(ConfigError, match=r"SAPO_TOKENS_FILE, .*absent: cannot be read"):
        environment(tokens_file=str(tmp_path / "absent")).tokens()


def locked(tokens: Tokens) -> FastAPI:
    app = FastAPI()
    app.add_middleware(Door, tokens=tokens)

    @app.get("/v1/status")
    async def status() -> dict[str, str]:
        return {}

    return app


async def test_a_client_reads_its_file_again_when_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = tmp_path / "tokens", tmp_path / "token"
    server.write_text(f"viewer: {OLD}")
    client.write_text(OLD)
    async with (
        serving(locked(Tokens.in_file(str(server))), "127.0.0.1:0") as url,
        ControlPlaneClient(url, Credential(file=str(client)), patience=5) as asks,
    ):
        await asks.status()
        asks._credential._file._next_look = math.inf  # type: ignore[union-attr]  # it looks only when it is refused
        server.write_text(f"viewer: {NEW}")
        client.write_text(NEW)
        await asks.status()


async def test_a_client_that_only_downloads_is_patient_at_every_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its patience begins anew with each, however long the one before is over."""
    monkeypatch.setattr(auth, "ROTATION_SECONDS", 1.0)
    content = b"weights"
    (server := tmp_path / "tokens").write_text(f"worker: {OLD}")
    (client := tmp_path / "token").write_text(NEW)
    blob = Blob(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    app = locked(Tokens.in_file(str(server)))

    @app.get("/v1/blobs/{sha256}")
    async def fetch(sha256: str) -> Response:
        return Response(content)

    async with serving(app, "127.0.0.1:0") as url:
        current = [OLD, NEW]
        async with ControlPlaneClient(
            url,
            Credential(file=str(client)),
            patience=10,
            waiting=lambda reason: reason and client.write_text(current[0]),
        ) as asks:
            await asks.download(blob, tmp_path)
            (tmp_path / blob.sha256).unlink()
            await asyncio.sleep(auth.ROTATION_SECONDS)
            current.reverse()
            server.write_text(f"worker: {NEW}")
            await asks.download(blob, tmp_path)


async def test_a_refusal_without_a_body_is_understood(tmp_path: Path) -> None:
    """As those to HEAD are, which an upload begins with: the learner ended of it in the middle of an exchange."""
    (server := tmp_path / "tokens").write_text(f"learner: {NEW}")
    async with (
        serving(locked(Tokens.in_file(str(server))), "127.0.0.1:0") as url,
        ControlPlaneClient(url, Credential(OLD), patience=5) as asks,
    ):
        with pytest.raises(Unauthenticated):
            await asks.upload(tmp_path / "blob", Blob(sha256="0" * 64, size=1))


async def test_a_client_waits_for_the_other_half_of_an_exchange(tmp_path: Path) -> None:
    """The server's file is changed first, and its own later: it asks again meanwhile, and says why."""
    server, client, reasons = tmp_path / "tokens", tmp_path / "token", list[str | None]()
    server.write_text(f"viewer: {NEW}")
    client.write_text(OLD)

    def waiting(reason: str | None) -> None:
        reasons.append(reason)
        client.write_text(NEW)

    async with (
        serving(locked(Tokens.in_file(str(server))), "127.0.0.1:0") as url,
        ControlPlaneClient(url, Credential(file=str(client)), patience=10, waiting=waiting) as asks,
    ):
        await asks.status()
    assert "wrong or missing token" in str(reasons[0])
    assert reasons[-1] is None


async def test_a_client_gives_up_in_the_end_and_at_once_where_nothing_can_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(OLD)
    monkeypatch.setattr(auth, "ROTATION_SECONDS", 0.2)
    asked = 0

    async with serving(locked(Tokens.one(NEW)), "127.0.0.1:0") as url:
        for credential, least in ((Credential(file=str(tmp_path / "token")), 2), (Credential(OLD), 1)):
            asked = 0

            async def count(request: httpx.Request) -> None:
                nonlocal asked
                asked += 1

            async with ControlPlaneClient(url, credential, patience=60) as asks:
                asks._http.event_hooks["request"].append(count)
                with pytest.raises(Unauthenticated, match="set SAPO_TOKEN to the run's"):
                    await asks.status()
            assert asked >= least
            assert least > 1 or asked == 1


def test_who_is_refused_again_and_again_is_said_once_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(seldom.time, "monotonic", lambda: clock[0])
    door = Refusals("HTTP")
    for seconds in (1, 2, 3, 59, 61, 62):
        clock[0] = seconds
        door.note("10.0.0.1", "wrong token")
    door.note("10.0.0.2", "wrong token")
    assert caplog.messages == [
        "HTTP refused 10.0.0.1: wrong token",
        "HTTP refused 10.0.0.1: wrong token (3 more since it was said last)",
        "HTTP refused 10.0.0.2: wrong token",
    ]
    for number in range(3):
        door.note("10.0.0.3", f"GET /v1/groups/{number}: not with this token", kind="not with this token")
    assert caplog.messages[3:] == ["HTTP refused 10.0.0.3: GET /v1/groups/0: not with this token"]
    for number in range(3 * seldom.MAX_KINDS):
        door.note("10.0.0.1", f"reason {number}")
    assert len(door._notes) == seldom.MAX_KINDS, "however many reasons somebody invents"
