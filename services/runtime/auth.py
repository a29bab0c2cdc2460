"""The run's token: one sentence for a wrong one, whichever way it came."""

import hmac

from sapo_learner.errors import Unauthenticated


def check_bearer(given: bytes, token: str) -> Unauthenticated | None:
    """Why the value of an `authorization` header or metadata entry is refused; compared in constant time."""
    if hmac.compare_digest(given, f"Bearer {token}".encode()):
        return None
    return Unauthenticated(
        "wrong or missing token",
        where="Authorization header",
        fix="set SAPO_TOKEN to the run's (that of a `sapo up` is in services.json of its directory)",
    )
