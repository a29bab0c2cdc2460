"""One log line per event: time, service, level, message. Standard error, so that `sapo up` can file it per process."""

import logging
import sys
import time


def configure(service: str, *, level: str = "INFO") -> None:
    formatter = logging.Formatter(f"%(asctime)s.%(msecs)03dZ {service} %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "asyncio", "uvicorn.access", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
