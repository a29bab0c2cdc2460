"""Blobs in a directory, named by their SHA-256: written whole or not at all, never changed."""

import asyncio
import hashlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile

from sapo_learner.disk import naming
from sapo_learner.errors import Mismatch, NotFound, Unavailable
from sapo_learner.segment import fsync

GRACE_SECONDS = 600  # a blob may wait this long for the manifest that names it


class BlobDirectory:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("*.upload"):
            leftover.unlink()

    def path(self, sha256: str) -> Path:
        """Raises NotFound."""
        _check_name(sha256)
        path = self._directory / sha256
        if not path.is_file():
            raise NotFound(
                f"no blob {sha256}", where="blobs", fix="its snapshot may have been superseded: fetch the newest"
            )
        return path

    def keep_a_while(self, path: Path) -> None:
        """Start the blob's grace anew: whoever asks whether it is there may be about to name it in a manifest."""
        os.utime(path)

    async def put(self, sha256: str, chunks: AsyncIterator[bytes], size: int = 0) -> None:
        """Store what arrives, durably, if it has that digest; raises Mismatch otherwise.

        size: bytes that are said to come. Raises Unavailable, before the first of them, when the disk has no room.
        """
        _check_name(sha256)
        if size > (free := shutil.disk_usage(self._directory).free):
            what = f"{size} bytes do not fit into the {free} that are free"
            raise Unavailable(what, where=f"blob {sha256}", fix="make room on the disk")
        digest, path = hashlib.sha256(), self._directory / sha256
        upload = NamedTemporaryFile(dir=self._directory, suffix=".upload", delete=False)  # noqa: SIM115
        try:
            with naming(path), upload as file:
                async for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
            if digest.hexdigest() != sha256:
                raise Mismatch(
                    f"the upload's SHA-256 is {digest.hexdigest()}", where=f"blob {sha256}", fix="upload again"
                )
            os.replace(upload.name, path)
        except BaseException:
            os.unlink(upload.name)
            raise
        await asyncio.to_thread(fsync, self._directory)

    def keep_only(self, digests: Iterable[str], forgotten: Mapping[str, float] | None = None) -> None:
        """Delete every other blob whose grace is over.

        forgotten: blobs of manifests that are gone, with the Unix time those were registered; such a blob needs no
        grace unless somebody has asked for it again since.
        """
        wanted, oldest = set(digests), time.time() - GRACE_SECONDS
        for path in self._directory.iterdir():
            if path.name in wanted or path.suffix == ".upload":
                continue
            if path.stat().st_mtime < max(oldest, (forgotten or {}).get(path.name, 0.0)):
                path.unlink(missing_ok=True)


def _check_name(sha256: str) -> None:
    if not (len(sha256) == 64 and set(sha256) <= set("0123456789abcdef")):
        raise NotFound(f"{sha256[:80]!r} is not a SHA-256 in hex", where="blobs")
