"""The control plane's HTTP client: retried with back-off while it cannot be reached, errors raised as our own."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
from httpx_sse import aconnect_sse
from pydantic import BaseModel
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_random_exponential

from sapo_learner import errors
from sapo_learner.manifest import Blob, Manifest
from services.runtime import api
from services.runtime.settings import RunConfig

log = logging.getLogger(__name__)
Body = TypeVar("Body", bound=BaseModel)
# Two classes share INVALID_ARGUMENT; trajectories do not travel here.
_BY_CODE = {each.code: each for each in errors.SapoError.__subclasses__() if each is not errors.InvalidTrajectory}
CHUNK = 1 << 20


class ControlPlaneClient:
    """One per process. `patience`: seconds of unreachability before a call raises Unavailable."""

    def __init__(self, url: str, token: str, *, patience: float = 60.0) -> None:
        self.url, self.patience = url.rstrip("/"), patience
        self._http = httpx.AsyncClient(
            base_url=self.url, headers={"Authorization": f"Bearer {token}"}, timeout=httpx.Timeout(30.0, connect=5.0)
        )

    async def __aenter__(self) -> "ControlPlaneClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def config(self) -> RunConfig:
        return RunConfig.model_validate(await self._json("GET", "/v1/config"))

    async def status(self) -> dict[str, Any]:
        status: dict[str, Any] = await self._json("GET", "/v1/status")
        return status

    async def ledger(self) -> dict[str, Any]:
        ledger: dict[str, Any] = await self._json("GET", "/v1/ledger")
        return ledger

    async def lease(self, request: api.LeaseRequest) -> api.LeaseResponse:
        return await self._post("/v1/leases", request, api.LeaseResponse, timeout=request.wait_seconds + 30)

    async def release(self, request: api.ReleaseRequest) -> None:
        await self._json("POST", "/v1/leases/release", request)

    async def heartbeat(self, request: api.Heartbeat) -> api.HeartbeatResponse:
        return await self._post("/v1/workers/heartbeat", request, api.HeartbeatResponse)

    async def evaluated(self, request: api.ChunkResult) -> None:
        await self._json("POST", "/v1/evaluations/results", request)

    async def learner_report(self, report: api.LearnerReport) -> None:
        await self._json("POST", "/v1/learner", report)

    async def publish(self, request: api.PublishRequest) -> api.PublishResponse:
        return await self._post("/v1/policies", request, api.PublishResponse)

    async def manifest(self, version: int | None = None) -> Manifest:
        """Manifest of a version (None: the current one); raises NotFound when it is not (or no longer) kept."""
        path = "/v1/policies/current" if version is None else f"/v1/policies/{version}"
        return Manifest.model_validate(await self._json("GET", path))

    async def versions(self) -> dict[int, int]:
        """Kept policy version -> optimizer step."""
        return {int(version): step for version, step in (await self._json("GET", "/v1/policies")).items()}

    async def upload(self, path: Path, blob: Blob) -> None:
        """PUT a file under its digest, unless it is there already."""
        if (await self._request("HEAD", f"/v1/blobs/{blob.sha256}", accept=(404,))).status_code == 200:
            return
        content = await asyncio.to_thread(path.read_bytes)
        await self._request("PUT", f"/v1/blobs/{blob.sha256}", content=content, timeout=600)

    async def download(self, blob: Blob, directory: Path) -> Path:
        """GET a blob into `directory`, going on where an earlier try stopped; the digest is verified."""
        target = directory / blob.sha256
        if target.exists():
            return target
        partial = directory / f"{blob.sha256}.part"
        async for attempt in self._retrying():
            with attempt:
                await self._fetch_rest(blob, partial)
        arrived = await asyncio.to_thread(Blob.of, partial)
        if arrived != blob:
            partial.unlink()
            raise errors.Mismatch(f"blob {blob.sha256[:12]} arrived as {arrived.sha256[:12]}", where=self.url)
        os.replace(partial, target)
        return target

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Server-sent events until the connection ends."""
        timeout = httpx.Timeout(30.0, read=60.0)
        async with aconnect_sse(self._http, "GET", "/v1/events", timeout=timeout) as source:
            source.response.raise_for_status()
            async for event in source.aiter_sse():
                yield {"event": event.event, "data": event.json() if event.data else None}

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
            with partial.open("ab" if response.status_code == 206 else "wb") as file:
                async for chunk in response.aiter_bytes(CHUNK):
                    file.write(chunk)

    async def _post(self, path: str, body: BaseModel, answer: type[Body], timeout: float | None = None) -> Body:
        return answer.model_validate(await self._json("POST", path, body, timeout=timeout))

    async def _json(self, method: str, path: str, body: BaseModel | None = None, timeout: float | None = None) -> Any:
        content = body.model_dump_json() if body is not None else None
        headers = {"Content-Type": "application/json"} if content else None
        return (await self._request(method, path, content=content, headers=headers, timeout=timeout)).json()

    async def _request(
        self, method: str, path: str, *, accept: tuple[int, ...] = (), timeout: float | None = None, **options: Any
    ) -> httpx.Response:
        async for attempt in self._retrying():
            with attempt:
                limit = timeout if timeout is not None else httpx.USE_CLIENT_DEFAULT
                response = await self._http.request(method, path, timeout=limit, **options)
                if response.status_code >= 400 and response.status_code not in accept:
                    raise _error(response)
        return response

    def _retrying(self) -> AsyncRetrying:
        def gave_up(state: RetryCallState) -> Any:
            cause = state.outcome.exception() if state.outcome else None
            if isinstance(cause, errors.SapoError):
                raise cause
            detail = str(cause) or type(cause).__name__
            raise errors.Unavailable(
                f"control plane not reachable for {self.patience:.0f} s: {detail}", where=self.url,
                fix="is it running, and is SAPO_CONTROL_PLANE_URL its address?",
            ) from cause  # fmt: skip

        return AsyncRetrying(
            retry=retry_if_exception_type((httpx.TransportError, errors.Unavailable)),
            wait=wait_random_exponential(multiplier=0.1, max=3),
            stop=stop_after_delay(self.patience),
            retry_error_callback=gave_up,
        )


def _error(response: httpx.Response) -> errors.SapoError:
    """The error that the control plane answered with, as the class it was raised as."""
    try:
        body = response.json()["error"]
        kind = _BY_CODE.get(body["code"], errors.SapoError)
        return kind(body["what"], where=body["where"], fix=body["fix"])
    except (ValueError, KeyError, TypeError):
        detail = response.text[:300]
        kind = errors.Unavailable if response.status_code in (502, 503, 504) else errors.SapoError
        return kind(f"HTTP {response.status_code}: {detail}", where=str(response.request.url))
