"""The control plane's client against a real HTTP server: resumed downloads, verified digests, our errors, patience."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from sapo_learner import errors
from sapo_learner.manifest import Blob
from services.runtime import api
from services.runtime.client import ControlPlaneClient
from services.runtime.http import probe_app, serving
from services.runtime.lifecycle import Lifecycle
from services.runtime.metrics import RolloutMetrics

CONTENT = bytes(range(256)) * (5 << 12)  # 5 MiB: the client writes 1 MiB at a time
BLOB = Blob(sha256=hashlib.sha256(CONTENT).hexdigest(), size=len(CONTENT))


class Server:
    """Serves one blob, and raises what the test says. `ranges`: the Range header of every download."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "served"
        self.path.write_bytes(CONTENT)
        self.ranges: list[str] = []
        self.breaks = 0  # this many answers end in the middle
        self.endless = False  # an answer goes on for ever
        self.raises: list[Exception] = []
        self.url = ""

    def app(self) -> FastAPI:
        app = probe_app(Lifecycle(), RolloutMetrics().registry)

        @app.get("/v1/blobs/{sha256}")
        async def blob(sha256: str, request: Request) -> Response:
            if sha256 != BLOB.sha256:
                raise errors.NotFound("no such blob", where="blobs", fix="fetch the newest")
            self.ranges.append(request.headers.get("range", ""))
            if self.endless:
                return StreamingResponse(self._forever())
            if self.breaks:
                self.breaks -= 1
                return StreamingResponse(self._half(), headers={"Content-Length": str(BLOB.size)})
            return FileResponse(self.path, headers={"ETag": f'"{sha256}"'})

        @app.post("/v1/leases/release")
        async def release(_: api.ReleaseRequest) -> dict[str, Any]:
            if self.raises:
                raise self.raises.pop(0)
            return {}

        return app

    async def _forever(self) -> AsyncIterator[bytes]:
        while True:
            yield CONTENT
            await asyncio.sleep(0)  # for the server to notice who has left

    async def _half(self) -> AsyncIterator[bytes]:
        yield CONTENT[: BLOB.size // 2]
        raise ConnectionResetError  # the server drops the connection


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path)
    async with serving(server.app(), "127.0.0.1:0") as server.url:
        yield server


@pytest_asyncio.fixture
async def client(server: Server) -> AsyncIterator[ControlPlaneClient]:
    async with ControlPlaneClient(server.url, "token", patience=3) as client:
        yield client


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def test_a_download_goes_on_where_the_connection_broke(
    server: Server, client: ControlPlaneClient, here: Path
) -> None:
    server.breaks = 1
    path = await client.download(BLOB, here)
    assert path.read_bytes() == CONTENT
    assert server.ranges[0] == ""
    assert server.ranges[1].startswith("bytes=")
    assert 0 < int(server.ranges[1][6:-1]) <= BLOB.size // 2
    assert names(here) == [BLOB.sha256]


async def test_a_download_goes_on_where_an_earlier_process_stopped(
    server: Server, client: ControlPlaneClient, here: Path
) -> None:
    (here / f"{BLOB.sha256}.part").write_bytes(CONTENT[:1000])
    assert (await client.download(BLOB, here)).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


async def test_what_is_there_is_not_downloaded_again(server: Server, client: ControlPlaneClient, here: Path) -> None:
    await client.download(BLOB, here)
    await client.download(BLOB, here)
    assert server.ranges == [""]


@pytest.mark.parametrize("begun", [b"", b"wrong beginning", CONTENT + b"too long"])
async def test_content_with_another_digest_is_refused_and_forgotten(
    server: Server, client: ControlPlaneClient, here: Path, begun: bytes
) -> None:
    if begun:
        (here / f"{BLOB.sha256}.part").write_bytes(begun)
    else:
        server.path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(errors.Mismatch, match=BLOB.sha256[:12]):
        await client.download(BLOB, here)
    assert names(here) == []


async def test_content_without_an_end_is_not_written_beyond_its_size(
    server: Server, client: ControlPlaneClient, here: Path
) -> None:
    server.endless = True
    async with asyncio.timeout(30):
        with pytest.raises(errors.Mismatch, match=BLOB.sha256[:12]):
            await client.download(BLOB, here)
    assert names(here) == []


async def test_a_blob_that_is_not_there_is_not_found(client: ControlPlaneClient, here: Path) -> None:
    with pytest.raises(errors.NotFound, match="no such blob"):
        await client.download(Blob(sha256="0" * 64, size=1), here)
    assert names(here) == []


@pytest.mark.parametrize(
    "kind", [each for each in errors.SapoError.__subclasses__() if each not in (errors.Unavailable,)]
)
async def test_an_error_arrives_as_it_was_raised(
    server: Server, client: ControlPlaneClient, kind: type[errors.SapoError]
) -> None:
    server.raises = [kind("what", where="where", fix="fix")]
    with pytest.raises(errors.SapoError) as caught:
        await client.release(api.ReleaseRequest(worker="w", leases=[]))
    error = caught.value
    assert (error.what, error.where, error.fix, error.code) == ("what", "where", "fix", kind.code)


async def test_a_server_that_is_not_ready_is_asked_again(server: Server, client: ControlPlaneClient) -> None:
    server.raises = [errors.Unavailable("starting"), errors.Unavailable("starting")]
    await client.release(api.ReleaseRequest(worker="w", leases=[]))
    assert server.raises == []


async def test_an_unreachable_server_is_unavailable_when_patience_ends(server: Server) -> None:
    async with serving(server.app(), "127.0.0.1:0") as url:
        pass
    async with ControlPlaneClient(url, "token", patience=0.05) as client:
        with pytest.raises(errors.Unavailable, match="SAPO_CONTROL_PLANE_URL"):
            await client.manifest()
