"""Who may call ingest: the token of each call, its role, and that it still counts while a stream goes on."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from sapo_learner.errors import SapoError, Unavailable
from services.runtime import roles
from services.runtime.auth import Tokens, wrong_token
from services.runtime.grpc_errors import abort
from services.runtime.seldom import Refusals


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without a token whose role may make them, probes of the health service excepted."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens, self._refusals = tokens, Refusals("gRPC")

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        if details.method in roles.GRPC_OPEN:
            return _unread(await continuation(details))
        given = str(dict(details.invocation_metadata or ()).get("authorization", "")).encode()
        refusal = self._refusal(given, details.method)
        if refusal is not None:
            return self._refuse(refusal)
        handler = await continuation(details)
        return self._watched(handler, given, details.method) if handler and handler.stream_stream else handler

    def _refusal(self, given: bytes, method: str) -> SapoError | None:
        role = self._tokens.role(given)
        return wrong_token() if role is None else roles.refusal(role, roles.of_method(method), method)

    def _refuse(self, refusal: SapoError) -> Any:
        async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
            self._refusals.note(_host(context.peer()), str(refusal)[:200], kind=refusal.what)
            await abort(context, refusal)

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _watched(self, handler: Any, given: bytes, method: str) -> Any:
        """A stream outlives many a token: it ends with the first message after its own was taken away."""

        async def still_allowed(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
            async for request in requests:
                if self._refusal(given, method) is not None:
                    fix = "connect again, with one that still counts"
                    raise Unavailable("the token of this stream counts no more", where=method, fix=fix)
                yield request

        async def behave(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async for response in handler.stream_stream(still_allowed(requests), context):
                yield response

        return grpc.stream_stream_rpc_method_handler(behave, handler.request_deserializer, handler.response_serializer)


def _unread(handler: Any) -> Any:
    """As if nothing stood in the request, which stays with the sender: without a token it may be as large as a group.

    A probe that names a service hears of the process, as all others do.
    """

    async def answer(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        yield await handler.unary_unary(handler.request_deserializer(b""), context)

    return grpc.stream_stream_rpc_method_handler(answer, None, handler.response_serializer)


def _host(peer: str) -> str:
    """ "ipv4:127.0.0.1:1234" -> "127.0.0.1"."""
    return peer.partition(":")[2].rpartition(":")[0] or peer
