"""The tree of errors over gRPC: status code of the class, the sentence as details, its parts in trailing metadata."""

import json
from typing import Any, NoReturn

import grpc

from sapo_learner import errors
from sapo_learner.errors import SapoError
from services.runtime.error_parts import from_parts, to_parts
from services.runtime.tls import meaning_for_client

METADATA_KEY = "sapo-error-bin"
_PART_BYTES = 800  # a peer takes 8 KiB of metadata: three parts, and the sentence percent-encoded
_INGEST_THERE = "is it running, and is SAPO_INGEST_ADDRESS its address?"
_PLAIN: dict[grpc.StatusCode, tuple[type[SapoError], str]] = {
    grpc.StatusCode.UNAVAILABLE: (errors.Unavailable, _INGEST_THERE),
    grpc.StatusCode.DEADLINE_EXCEEDED: (errors.Unavailable, _INGEST_THERE),
    grpc.StatusCode.CANCELLED: (errors.Unavailable, "try again"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (errors.Unavailable, "try again"),
    grpc.StatusCode.UNAUTHENTICATED: (errors.Unauthenticated, "set SAPO_TOKEN to the run's"),
    grpc.StatusCode.PERMISSION_DENIED: (errors.Forbidden, "use a token of another role"),
    grpc.StatusCode.INVALID_ARGUMENT: (errors.InvalidTrajectory, "run both ends at the same version"),
    grpc.StatusCode.UNIMPLEMENTED: (
        errors.Mismatch,
        "is SAPO_INGEST_ADDRESS the address of an ingest of this version?",
    ),
    grpc.StatusCode.FAILED_PRECONDITION: (errors.Mismatch, "run both ends at the same version"),
    grpc.StatusCode.NOT_FOUND: (errors.NotFound, ""),
    grpc.StatusCode.ABORTED: (errors.Fenced, ""),
    grpc.StatusCode.DATA_LOSS: (errors.Corrupt, ""),
}


async def abort(context: grpc.aio.ServicerContext, error: SapoError) -> NoReturn:
    """End the call with this error; `from_rpc` makes the same one of it."""
    parts = {name: _shortened(text) for name, text in to_parts(error).items()}
    metadata = ((METADATA_KEY, json.dumps(parts, ensure_ascii=False).encode()),)
    await context.abort(grpc.StatusCode[error.code], _shortened(str(error)), metadata)
    raise AssertionError("abort returns never")


def answered(error: grpc.aio.AioRpcError) -> SapoError | None:
    """The error that the peer raised; None when the failure is gRPC's own."""
    data: Any = dict(error.trailing_metadata() or ()).get(METADATA_KEY)
    try:
        return from_parts(json.loads(data)) if data else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def from_rpc(error: grpc.aio.AioRpcError, *, where: str) -> SapoError:
    """The error that the peer raised, word for word; else gRPC's own, which gets `where`."""
    raised = answered(error)
    if raised is not None:
        return raised
    code, details = error.code(), error.details() or error.code().name
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        # Sending it again cannot help.
        return errors.InvalidTrajectory(details, where=where, fix="lower sampling.max_tokens or sampling.group_size")
    kind, fix = _PLAIN.get(code, (SapoError, "see its log"))
    if code is grpc.StatusCode.UNAVAILABLE and (found := meaning_for_client(details)):
        return kind(f"{found[0]}: {found[1]} [{details}]", where=where, fix=fix)
    return kind(details, where=where, fix=fix)


def _shortened(text: str) -> str:
    """At most _PART_BYTES of UTF-8, without what UTF-8 cannot hold: metadata has a limit, a sentence does not."""
    data = text.encode("utf-8", "replace")
    if len(data) <= _PART_BYTES:
        return data.decode()
    return data[: _PART_BYTES - 4].decode(errors="ignore") + " ..."
