"""One error, whichever way it comes: raised behind gRPC and behind HTTP, it is the same one on the other side."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from sapo_learner import errors
from sapo_learner.errors import SapoError
from services.runstore.connection import OutOfMemory
from services.runtime import lifecycle
from services.runtime.auth import Tokens, wrong_token
from services.runtime.client import ControlPlaneClient
from services.runtime.grpc_errors import METADATA_KEY, abort, answered, from_rpc
from services.runtime.http import Door, probe_app, serving
from services.runtime.lifecycle import Lifecycle
from services.runtime.metrics import RolloutMetrics

TREE = [SapoError, *SapoError.__subclasses__()]
Handler = Callable[[bytes, grpc.aio.ServicerContext], Awaitable[bytes]]


@asynccontextmanager
async def method(handler: Handler) -> AsyncIterator[Any]:
    """A callable that calls `handler` over gRPC."""
    server = grpc.aio.server()
    handlers = {"call": grpc.unary_unary_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel.unary_unary("/test.Service/call")
    await server.stop(None)


async def over_grpc(error: SapoError) -> grpc.aio.AioRpcError:
    async def handler(_: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return await abort(context, error)

    async with method(handler) as call:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
    return caught.value


async def over_http(error: SapoError) -> SapoError:
    app = probe_app(Lifecycle(), RolloutMetrics().registry)

    @app.get("/v1/config")
    async def config() -> None:
        raise error

    async with serving(app, "127.0.0.1:0") as url, ControlPlaneClient(url, "token", patience=0.05) as client:
        with pytest.raises(SapoError) as caught:
            await client.config()
    return caught.value


def parts(error: SapoError) -> tuple[type[SapoError], str, str, str, str, int]:
    return type(error), error.what, error.where, error.fix, str(error), error.exit_code


@pytest.mark.parametrize("kind", TREE)
async def test_class_and_sentence_are_the_same_over_grpc_and_http(kind: type[SapoError]) -> None:
    raised = kind("tämä on 'wrong'", where="draw 7, response 1", fix="do: this\nand that")
    failure = await over_grpc(raised)
    assert failure.code() is grpc.StatusCode[kind.code]
    assert parts(from_rpc(failure, where="elsewhere")) == parts(raised)
    assert parts(await over_http(raised)) == parts(raised)


@pytest.mark.parametrize("kind", TREE)
def test_a_terminal_ends_with_the_same_code_and_sentence(
    kind: type[SapoError], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "_end_after", lambda seconds: None)  # this process is the tests' own

    async def serve(_: Lifecycle) -> None:
        raise from_rpc(await over_grpc(kind("wrong", where="here", fix="mend it")), where="elsewhere")

    assert lifecycle.run(serve) == kind.exit_code
    assert [record.getMessage() for record in caplog.records][-1] == "here: wrong (mend it)"


async def test_a_class_outside_the_tree_counts_as_the_one_it_derives_from() -> None:
    assert type(from_rpc(await over_grpc(OutOfMemory("full")), where="")) is errors.Unavailable


async def test_an_endless_sentence_still_gets_through() -> None:
    """Metadata is limited to 8 KiB; and not everything can be written as UTF-8."""
    failure = await over_grpc(errors.Mismatch("\N{GRINNING FACE}" * 5000, where="\ud800" * 5000, fix="%" * 9000))
    error = from_rpc(failure, where="")
    assert type(error) is errors.Mismatch
    assert error.what.startswith("\N{GRINNING FACE}" * 150)
    assert error.where.startswith("???")


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        ("UNAVAILABLE", "Connection refused", errors.Unavailable),
        ("DEADLINE_EXCEEDED", "", errors.Unavailable),
        ("UNAUTHENTICATED", "who are you", errors.Unauthenticated),
        ("UNIMPLEMENTED", "Method not found!", errors.Mismatch),
        ("RESOURCE_EXHAUSTED", "too many streams", errors.Unavailable),
        ("RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (9 vs. 4)", errors.InvalidTrajectory),
        ("INTERNAL", "oops", SapoError),
    ],
)
async def test_grpc_s_own_errors_become_ours(code: str, details: str, kind: type[SapoError]) -> None:
    async def handler(_: bytes, context: grpc.aio.ServicerContext) -> bytes:
        await context.abort(grpc.StatusCode[code], details)
        raise AssertionError

    async with method(handler) as call:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
    error = from_rpc(caught.value, where="ingest HOST:1")
    assert answered(caught.value) is None
    assert (type(error), error.what, error.where) == (kind, details or code, "ingest HOST:1")
    assert error.fix


@pytest.mark.parametrize("data", [b"\xff", b"[]", b"null", b"{}", b'{"code": [], "what": 1}', b'{"kind": {}}'])
async def test_parts_that_are_none_do_not_hide_the_error(data: bytes) -> None:
    async def handler(_: bytes, context: grpc.aio.ServicerContext) -> bytes:
        await context.abort(grpc.StatusCode.ABORTED, "gone", ((METADATA_KEY, data),))
        raise AssertionError

    async with method(handler) as call:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
    assert parts(from_rpc(caught.value, where="x"))[:3] == (errors.Fenced, "gone", "x")


async def test_a_wrong_token_is_one_sentence_at_both_doors() -> None:
    app = probe_app(Lifecycle(), RolloutMetrics().registry)
    app.add_middleware(Door, tokens=Tokens.one("right"))
    async with serving(app, "127.0.0.1:0") as url, ControlPlaneClient(url, "wrong") as client:
        with pytest.raises(errors.Unauthenticated) as caught:
            await client.config()
    refusal = wrong_token()
    assert parts(caught.value) == parts(refusal)  # what ingest sends: tests/services/ingest
    assert json.dumps(str(refusal)).isascii()
