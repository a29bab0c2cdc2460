"""Who may do what, over real HTTP and gRPC: every route and method stands in the table, and the doors keep to it."""

import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.sapo.v1 import ingest_pb2
from sapo_learner.errors import Forbidden
from services.runtime import roles
from services.runtime.auth import Tokens, cookie_name, cookie_value
from services.runtime.client import ControlPlaneClient
from services.runtime.grpc_errors import from_rpc
from services.runtime.roles import Role
from services.runtime.settings import RunConfig
from tests import small_run
from tests.ingest_door import Ingest, hello, open_ingest, refusal
from tests.small_run import Running, sha256

TOKENS = {role: f"a token of the role {role}".replace(" ", "-") for role in Role}
OUTSIDE = {"/healthz", "/readyz", "/metrics", "/", "/login", "/static/{name:path}"}
"""Routes that are not under /v1: probes, metrics, and the page, which has a login of its own."""


def bearer(role: Role) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[role]}"}


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    path = tmp_path / "tokens"
    path.write_text("\n".join(f"{role}: {token}" for role, token in TOKENS.items()))
    return Tokens.in_file(str(path))


@pytest_asyncio.fixture
async def running(config: RunConfig, redis: Any, tokens: Tokens) -> AsyncIterator[Running]:
    async with small_run.control_plane(config, redis.url, tokens=tokens, token=TOKENS[Role.ADMIN]) as started:
        yield started


@pytest_asyncio.fixture
async def ingest(running: Running, redis: Any, tokens: Tokens) -> AsyncIterator[Ingest]:
    async with open_ingest(running.config, redis.url, tokens=tokens) as opened:
        yield opened


def routes_of(router: Any) -> Iterator[tuple[str, str]]:
    """Method and path of every route of an application, whatever it is nested in."""
    for route in router.routes:
        if inner := getattr(route, "original_router", None):
            yield from routes_of(inner)
        elif hasattr(route, "routes"):
            yield from routes_of(route)
        else:
            yield from ((method, route.path) for method in route.methods)


async def test_every_http_route_stands_in_the_table(running: Running) -> None:
    found = set(routes_of(running.app))
    assert found, "the walk finds routes"
    assert {path for _, path in found if not path.startswith("/v1/")} == OUTSIDE
    assert {each for each in found if each[1].startswith("/v1/")} == roles.HTTP.keys()


def test_every_grpc_method_stands_in_the_table() -> None:
    services = ingest_pb2.DESCRIPTOR.services_by_name.values()
    found = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert found == roles.GRPC.keys()


def test_what_stands_in_no_table_is_the_admin_s() -> None:
    for roles_of_it in (
        roles.of_route("GET", "/v1/new"),
        roles.of_route("DELETE", "/v1/config"),
        roles.of_method("/x/Y"),
    ):
        assert roles_of_it == frozenset()
        assert all(roles.refusal(role, roles_of_it, "this") for role in Role if role is not Role.ADMIN)
        assert roles.refusal(Role.ADMIN, roles_of_it, "this") is None


def filled(path: str) -> str:
    """A path of that route, to what does not exist."""
    values = {"version": "99", "sha256": sha256(b"none"), "entry": "1-1"}
    return re.sub(r"{(\w+)}", lambda match: values[match[1]], path)


@pytest.mark.parametrize("role", list(Role))
async def test_a_role_gets_through_where_the_table_says_so_and_nowhere_else(running: Running, role: Role) -> None:
    """What is behind the door may find fault with the request: only 401 and 403 are the door's."""
    async with httpx.AsyncClient(base_url=running.url, headers=bearer(role), timeout=10) as http:
        for (method, path), allowed in roles.HTTP.items():
            async with http.stream(method, filled(path), content=b"" if method in ("POST", "PUT") else None) as answer:
                if role is Role.ADMIN or role in allowed:
                    assert answer.status_code not in (401, 403), (method, path)
                    continue
                assert answer.status_code == 403, (method, path)
                if method == "HEAD":
                    continue
                await answer.aread()
                error = answer.json()["error"]
                assert error["code"] == "PERMISSION_DENIED"
                assert error["where"] == f"{method} {filled(path)}"
                assert all(name in error["fix"] for name in (*allowed, "admin"))


def test_who_only_fetches_weights_cannot_keep_them_on_the_disk() -> None:
    """Who asks with HEAD whether a blob is there may be about to name it in a manifest, so its grace begins anew."""
    assert roles.of_route("HEAD", f"/v1/blobs/{sha256(b'any')}") == {Role.LEARNER}


async def test_a_client_is_told_which_role_it_lacks_and_the_log_who_it_was(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    async with ControlPlaneClient(running.url, TOKENS[Role.VIEWER], patience=1.0) as viewer:
        for _ in range(3):
            with pytest.raises(
                Forbidden, match=r"a token of role viewer may not do this \(use a token of role admin or worker"
            ):
                await viewer.release(small_run.api.ReleaseRequest(worker="w", leases=[]))
    (said,) = [message for message in caplog.messages if "refused" in message]
    assert said.startswith("HTTP refused 127.0.0.1: POST /v1/leases/release: a token of role viewer")
    assert not any(token in caplog.text for token in TOKENS.values())


async def test_no_token_and_a_wrong_one_are_in_the_log(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    async with httpx.AsyncClient(base_url=running.url) as http:
        assert (await http.get("/v1/status")).status_code == 401
        assert (await http.get("/v1/status", headers={"Authorization": "Bearer a-guess"})).status_code == 401
        assert (await http.get("/healthz")).status_code == 200
    assert "HTTP refused 127.0.0.1: Authorization header: wrong or missing token" in caplog.text
    assert "a-guess" not in caplog.text


async def test_what_a_path_holds_cannot_forge_a_line_of_the_log(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    async with httpx.AsyncClient(base_url=running.url, headers=bearer(Role.WORKER)) as http:
        assert (await http.get("/v1/x%0aERROR forged")).status_code == 403
    (said,) = [message for message in caplog.messages if "refused" in message]
    assert "\n" not in said


# ---- the page


@pytest.mark.parametrize(
    ("role", "status"), [(Role.VIEWER, 303), (Role.ADMIN, 303), (Role.WORKER, 403), (Role.LEARNER, 403)]
)
async def test_viewers_log_in_and_others_are_told_why_not(running: Running, role: Role, status: int) -> None:
    async with httpx.AsyncClient(base_url=running.url) as http:
        answer = await http.post("/login", data={"token": TOKENS[role]})
        assert answer.status_code == status
        assert ("set-cookie" in answer.headers) is (status == 303)
        assert status == 303 or f"a token of role {role}" in answer.text


async def test_an_admin_s_browser_may_read_what_a_viewer_may_and_no_more(running: Running) -> None:
    async with httpx.AsyncClient(base_url=running.url) as browser:
        await browser.post("/login", data={"token": TOKENS[Role.ADMIN]})
        assert (await browser.get("/v1/history")).status_code == 200
        assert (await browser.get(f"/v1/blobs/{sha256(b'none')}")).status_code == 403
        assert (await browser.post("/v1/leases", json={})).status_code == 401


@pytest.mark.parametrize("role", [Role.WORKER, Role.LEARNER])
async def test_a_cookie_that_somebody_makes_of_another_role_s_token_opens_nothing(running: Running, role: Role) -> None:
    cookie = f"{cookie_name(TOKENS[role])}={cookie_value(TOKENS[role])}"
    async with httpx.AsyncClient(base_url=running.url, headers={"Cookie": cookie}) as http:
        assert (await http.get("/v1/history")).status_code == 401
        assert (await http.get("/")).status_code == 401


# ---- gRPC


@pytest.mark.parametrize("role", list(Role))
async def test_workers_alone_stream_groups(
    ingest: Ingest, learner: Any, role: Role, caplog: pytest.LogCaptureFixture
) -> None:
    stream = ingest.open((("authorization", f"Bearer {TOKENS[role]}"),))
    if role in (Role.WORKER, Role.ADMIN):
        await stream.write(hello())
        assert (await stream.read()).WhichOneof("message") == "welcome"
        return
    code, details = await refusal(stream)
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert details.endswith(f"a token of role {role} may not do this (use a token of role admin or worker)")
    assert type(from_rpc(await ended(stream), where="")) is Forbidden
    assert f"gRPC refused 127.0.0.1: {next(iter(roles.GRPC))}: a token of role {role}" in caplog.text


async def ended(stream: Any) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        await stream.code(), await stream.initial_metadata(), await stream.trailing_metadata(), await stream.details()
    )


async def test_a_call_without_a_token_is_in_the_log_and_health_needs_none(
    ingest: Ingest, caplog: pytest.LogCaptureFixture
) -> None:
    code, _ = await refusal(ingest.open(()))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "gRPC refused 127.0.0.1: Authorization header: wrong or missing token" in caplog.text
    answer = await health_pb2_grpc.HealthStub(ingest.channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watch = health_pb2_grpc.HealthStub(ingest.channel).Watch(health_pb2.HealthCheckRequest(), timeout=5)
    assert await watch.code() is grpc.StatusCode.UNAUTHENTICATED, "nor does anybody keep a connection for nothing"
