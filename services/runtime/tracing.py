"""W3C Trace Context (https://www.w3.org/TR/trace-context/, version 00): one trace per group, from lease to step.

The id joins log lines; nothing is exported. Ids are random and have nothing to do with the draw's seed.
"""

import re
import secrets

_FORM = re.compile(r"00-(?P<trace>[0-9a-f]{32})-(?P<parent>[0-9a-f]{16})-[0-9a-f]{2}")


def new_traceparent() -> str:
    return f"00-{_nonzero(16)}-{_nonzero(8)}-01"


def valid(traceparent: str) -> bool:
    found = _FORM.fullmatch(traceparent)
    return found is not None and found["trace"] != "0" * 32 and found["parent"] != "0" * 16


def trace_id(traceparent: str) -> str:
    """32 hex digits; "" where there is none."""
    return traceparent[3:35] if valid(traceparent) else ""


def _nonzero(count: int) -> str:
    """So many random bytes in hex: all zeros mean that there is no id."""
    return secrets.token_hex(count - 1) + f"{1 + secrets.randbelow(255):02x}"
