"""How long a request's body says that it is."""

from collections.abc import Mapping


def stated_length(headers: Mapping[str, str]) -> int | None:
    """Bytes of the body to come; None where no number holds: beside `chunked` a Content-Length bounds nothing."""
    length = headers.get("content-length", "")
    return int(length) if length.isdigit() and "transfer-encoding" not in headers else None
