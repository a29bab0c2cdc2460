"""Blobs in a directory, named by their SHA-256: written whole or not at all, never changed."""

import hashlib
import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from tempfile import NamedTemporaryFile

from sapo_learner.errors import Mismatch, NotFound


class BlobDirectory:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("*.upload"):
            leftover.unlink()

    def path(self, sha256: str) -> Path:
        """Raises NotFound."""
        if not (len(sha256) == 64 and set(sha256) <= set("0123456789abcdef")):
            raise NotFound(f"{sha256[:80]!r} is not a SHA-256 in hex", where="blobs")
        path = self._directory / sha256
        if not path.is_file():
            raise NotFound(
                f"no blob {sha256}", where="blobs", fix="its snapshot may have been superseded: fetch the newest"
            )
        return path

    async def put(self, sha256: str, chunks: AsyncIterator[bytes]) -> None:
        """Store what arrives if it has that digest; raises Mismatch otherwise."""
        digest = hashlib.sha256()
        with NamedTemporaryFile(dir=self._directory, suffix=".upload", delete=False) as file:
            try:
                async for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
                if digest.hexdigest() != sha256:
                    raise Mismatch(
                        f"the upload's SHA-256 is {digest.hexdigest()}", where=f"blob {sha256}", fix="upload again"
                    )
            except BaseException:
                os.unlink(file.name)
                raise
        os.replace(file.name, self._directory / sha256)

    def keep_only(self, digests: Iterable[str], *, younger_than: float) -> None:
        """Delete every other blob that was not uploaded after the Unix time `younger_than` (it may be awaiting its manifest)."""
        wanted = set(digests)
        for path in self._directory.iterdir():
            if path.name not in wanted and path.suffix != ".upload" and path.stat().st_mtime < younger_than:
                path.unlink(missing_ok=True)
