"""One log line per event: time, service, level, message. Standard error, so that `sapo up` can file it per process."""

import io
import logging
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Patient(io.FileIO):
    """Standard output or error: what a full disk or a closed pipe does not take is given up, and said afterwards."""

    _lost = 0

    def write(self, data: "ReadableBuffer", /) -> int:
        view = memoryview(data).cast("B")
        try:
            if self._lost:
                self._whole(b"\n... %d times there was no room to write here ...\n" % self._lost)
                self._lost = 0
            self._whole(view)
        except OSError:
            self._lost += 1
        return len(view)

    def _whole(self, data: "ReadableBuffer") -> None:
        view = memoryview(data)
        while view:
            view = view[super().write(view) :]


def configure(service: str, *, level: str = "INFO") -> None:
    """Log to standard error. No service dies because its output cannot be written."""
    sys.stdout, sys.stderr = _patient(sys.stdout, sys.__stdout__), _patient(sys.stderr, sys.__stderr__)
    formatter = logging.Formatter(f"%(asctime)s.%(msecs)03dZ {service} %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "asyncio", "uvicorn.access", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _patient(stream: Any, original: TextIO | None) -> Any:
    """The process' own stream in its patient form; one that somebody has put in its place stays."""
    if original is None or stream is not original:
        return stream
    stream.flush()
    raw = _Patient(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(raw, original.encoding, "backslashreplace", line_buffering=True, write_through=True)
