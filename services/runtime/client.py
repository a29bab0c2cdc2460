"""The control plane's HTTP client: retried with back-off while it cannot be reached, errors raised as our own."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
from httpx_sse import aconnect_sse
from pydantic import BaseModel
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_delay, wait_random_exponential

from sapo_learner import errors
from sapo_learner.config import parse
from sapo_learner.manifest import Blob, Manifest
from services.runtime import api
from services.runtime.auth import Credential
from services.runtime.error_parts import from_parts
from services.runtime.settings import RunConfig
from services.runtime.tls import SCHEME, Tls, meaning_for_client

Body = TypeVar("Body", bound=BaseModel)
CHUNK = 1 << 20
_OTHER_VERSION = "run this process and the control plane at versions that know the same settings"
CONNECT_SECONDS, UPLOAD_FACTOR = 5.0, 20


class ControlPlaneClient:
    """One per process.

    patience: seconds of unreachability before a call raises Unavailable. answer_seconds: how long one request may be
    without an answer (a long poll: beyond what it asked for; an upload, which is fsynced: UPLOAD_FACTOR times as long).
    waiting: told why calls are being repeated, and None when one has succeeded again.
    """

    def __init__(
        self,
        url: str,
        token: str | Credential,
        *,
        tls: Tls | None = None,
        patience: float = 60.0,
        answer_seconds: float = 30.0,
        waiting: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        self.url, self.patience, self._waiting = url.rstrip("/"), patience, waiting
        self.run = ""  # its name and its directory's id, once `config` was answered
        self._answer_seconds = min(answer_seconds, patience / 2)  # so that one is tried again
        self._credential = Credential(token) if isinstance(token, str) else token
        self._context = (tls or Tls()).client_context() if self.url.startswith(SCHEME) else None
        self._http = httpx.AsyncClient(
            base_url=self.url,
            auth=self._authorized,
            timeout=self._timeout(),
            verify=self._context() if self._context else True,
        )

    def _authorized(self, request: httpx.Request) -> httpx.Request:
        if self._context:
            self._context()  # its files may have been exchanged
        request.headers["Authorization"] = self._credential.header
        return request

    def _timeout(self, answer_seconds: float | None = None) -> httpx.Timeout:
        return httpx.Timeout(answer_seconds or self._answer_seconds, connect=min(CONNECT_SECONDS, self._answer_seconds))

    async def __aenter__(self) -> "ControlPlaneClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def config(self) -> RunConfig:
        settings = await self._json("GET", "/v1/config")
        return parse(RunConfig, settings, where=f"{self.url}/v1/config", fix=_OTHER_VERSION)

    async def status(self) -> dict[str, Any]:
        status: dict[str, Any] = await self._json("GET", "/v1/status")
        return status

    async def ledger(self) -> dict[str, Any]:
        ledger: dict[str, Any] = await self._json("GET", "/v1/ledger")
        return ledger

    async def lease(self, request: api.LeaseRequest) -> api.LeaseResponse:
        return await self._post("/v1/leases", request, api.LeaseResponse, longer=request.wait_seconds)

    async def release(self, request: api.ReleaseRequest) -> None:
        await self._json("POST", "/v1/leases/release", request)

    async def heartbeat(self, request: api.Heartbeat) -> api.HeartbeatResponse:
        return await self._post("/v1/workers/heartbeat", request, api.HeartbeatResponse)

    async def evaluated(self, request: api.ChunkResult) -> None:
        await self._json("POST", "/v1/evaluations/results", request)

    async def learner_report(self, report: api.LearnerReport) -> None:
        await self._json("POST", "/v1/learner", report)

    async def show(self, group: api.ShownGroup) -> None:
        await self._json("POST", "/v1/groups", group)

    async def publish(self, request: api.PublishRequest) -> api.PublishResponse:
        return await self._post("/v1/policies", request, api.PublishResponse)

    async def manifest(self, version: int | None = None) -> Manifest:
        """Manifest of a version (None: the current one); raises NotFound when it is not (or no longer) kept."""
        path = "/v1/policies/current" if version is None else f"/v1/policies/{version}"
        return parse(Manifest, await self._json("GET", path), where=f"{self.url}{path}", fix=_OTHER_VERSION)

    async def versions(self) -> dict[int, int]:
        """Kept policy version -> optimizer step."""
        return {int(version): step for version, step in (await self._json("GET", "/v1/policies")).items()}

    async def upload(self, path: Path, blob: Blob) -> None:
        """PUT a file under its digest, unless it is there already."""
        if (await self._request("HEAD", f"/v1/blobs/{blob.sha256}", accept=(404,))).status_code == 200:
            return
        content = await asyncio.to_thread(path.read_bytes)
        longer = (UPLOAD_FACTOR - 1) * self._answer_seconds
        await self._request("PUT", f"/v1/blobs/{blob.sha256}", content=content, longer=longer)

    async def download(self, blob: Blob, directory: Path) -> Path:
        """GET a blob into `directory`, going on where an earlier try stopped; the digest is verified."""
        target = directory / blob.sha256
        if target.exists():
            return target
        partial = directory / f"{blob.sha256}.part"
        async for attempt in self._retrying():
            with attempt:
                await self._fetch_rest(blob, partial)
                self._waiting(None)
        arrived = await asyncio.to_thread(Blob.of, partial)
        if arrived != blob:
            partial.unlink()
            raise errors.Mismatch(f"blob {blob.sha256[:12]} arrived as {arrived.sha256[:12]}", where=self.url)
        os.replace(partial, target)
        return target

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Server-sent events until the connection ends; raises Unavailable when it breaks or falls silent."""
        timeout = self._timeout(api.EVENT_SECONDS + self._answer_seconds)
        try:
            async with aconnect_sse(self._http, "GET", "/v1/events", timeout=timeout) as source:
                source.response.raise_for_status()
                self._credential.accepted()
                async for event in source.aiter_sse():
                    yield {"event": event.event, "data": event.json() if event.data else None}
        except (httpx.HTTPError, ValueError) as error:
            raise errors.Unavailable(f"the event stream ended: {_detail(error)}", where=self.url) from error

    async def _fetch_rest(self, blob: Blob, partial: Path) -> None:
        have = partial.stat().st_size if partial.exists() else 0
        if have >= blob.size:
            partial.touch()  # an empty blob is whole without a request
            return
        headers = {"Range": f"bytes={have}-", "If-Range": f'"{blob.sha256}"'} if have else {}
        async with self._http.stream("GET", f"/v1/blobs/{blob.sha256}", headers=headers) as response:
            if response.status_code >= 400:
                await response.aread()
                raise _error(response)
            self._credential.accepted()
            try:
                with partial.open("ab" if response.status_code == 206 else "wb") as file:
                    async for chunk in response.aiter_bytes(CHUNK):
                        file.write(chunk)
                        if file.tell() > blob.size:  # whoever sends it could go on until the disk is full
                            break
            except OSError as error:
                raise errors.Unavailable(str(error), where=str(partial), fix="make room on the disk") from error

    async def _post(self, path: str, body: BaseModel, answer: type[Body], longer: float = 0) -> Body:
        return answer.model_validate(await self._json("POST", path, body, longer=longer))

    async def _json(self, method: str, path: str, body: BaseModel | None = None, longer: float = 0) -> Any:
        content = body.model_dump_json() if body is not None else None
        headers = {"Content-Type": "application/json"} if content else None
        response = await self._request(method, path, content=content, headers=headers, longer=longer)
        try:
            return response.json()
        except ValueError:
            raise errors.SapoError(
                f"an answer that is not JSON: {response.text[:80]!r}", where=f"{self.url}{path}",
                fix="is SAPO_CONTROL_PLANE_URL the control plane's address?",
            ) from None  # fmt: skip

    async def _request(
        self, method: str, path: str, *, accept: tuple[int, ...] = (), longer: float = 0, **options: Any
    ) -> httpx.Response:
        async for attempt in self._retrying():
            with attempt:
                timeout = self._timeout(self._answer_seconds + longer)
                response = await self._http.request(method, path, timeout=timeout, **options)
                if response.status_code >= 400 and response.status_code not in accept:
                    raise _error(response)
                self._credential.accepted()
                self._waiting(None)
        self.run = response.headers.get(api.RUN_HEADER, self.run)
        return response

    def _may_pass(self, error: BaseException) -> bool:
        if isinstance(error, errors.Unauthenticated):
            return self._credential.refused()
        return isinstance(error, httpx.TransportError | errors.Unavailable)

    def _retrying(self) -> AsyncRetrying:
        def gave_up(state: RetryCallState) -> Any:
            cause = state.outcome.exception() if state.outcome else None
            if isinstance(cause, errors.SapoError):
                raise cause
            what, fix = _explained(cause)
            raise errors.Unavailable(
                f"the control plane cannot be reached, tried for {self.patience:g} s: {what}", where=self.url, fix=fix
            ) from cause

        def failed(state: RetryCallState) -> None:
            cause = state.outcome.exception() if state.outcome else None
            what = cause.what if isinstance(cause, errors.SapoError) else _explained(cause)[0]
            self._waiting(f"the control plane at {self.url}: {what}")

        return AsyncRetrying(
            retry=retry_if_exception(self._may_pass),
            wait=wait_random_exponential(multiplier=0.1, max=3),
            stop=stop_after_delay(self.patience),
            before_sleep=failed,
            retry_error_callback=gave_up,
        )


def _explained(error: BaseException | None) -> tuple[str, str]:
    """What keeps the control plane from being reached, and what to do."""
    said, cause = _detail(error), error
    unsaid = isinstance(error, httpx.ReadError | httpx.RemoteProtocolError) and error.request.url.scheme == "https"
    while cause is not None:  # httpx leaves out what ended a connection
        found = meaning_for_client(str(cause))
        if found and (not unsaid or "[SSL" in str(cause)):
            return f"{found[0]} [{cause}]", found[1]
        cause = cause.__cause__ or cause.__context__
    if unsaid:  # an alert that nobody passes on
        return f"it ends the connection [{said}]", "does it want a certificate of its clients (SAPO_TLS_CERT)?"
    return said, "is it running, and is SAPO_CONTROL_PLANE_URL its address?"


def _detail(error: BaseException | None) -> str:
    return str(error) or type(error).__name__


_BY_STATUS: dict[int, type[errors.SapoError]] = {401: errors.Unauthenticated, 403: errors.Forbidden} | dict.fromkeys(
    (502, 503, 504), errors.Unavailable
)
"""Of answers without a body of ours: those to HEAD, and a proxy's."""


def _error(response: httpx.Response) -> errors.SapoError:
    """The error that the control plane answered with, as the class it was raised as."""
    try:
        return from_parts(response.json()["error"])
    except (ValueError, KeyError, TypeError, AttributeError):
        detail = response.text[:300]
        kind = _BY_STATUS.get(response.status_code, errors.SapoError)
        return kind(f"HTTP {response.status_code}: {detail}", where=str(response.request.url))
