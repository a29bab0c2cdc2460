"""The run's token: one sentence for a wrong one, whichever way it came. And the cookie that a browser gets for it."""

import hashlib
import hmac
from urllib.parse import quote

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


def cookie_name(token: str) -> str:
    """Another one for every run: cookies do not tell ports apart, and several runs may be on one machine."""
    return f"sapo-{_derived(token, 'name')[:12]}"


def cookie_value(token: str) -> str:
    """What only those know who know the token, and from which nobody finds the token."""
    return _derived(token, "value")


def check_cookie(header: bytes, token: str) -> bool:
    """Whether a `cookie` header holds the run's; compared in constant time. Others of the same host, whatever they look
    like, do no harm: a parser of them all would stop at the first that is odd."""
    name, value = cookie_name(token), cookie_value(token)
    pairs = (pair.strip().partition("=") for pair in header.decode("latin-1").split(";"))
    return any(hmac.compare_digest(given.encode(), value.encode()) for known, _, given in pairs if known == name)


def page_address(url: str, token: str) -> str:
    """Of the dashboard, login included: what follows # never leaves the browser, where the page reads the token."""
    return f"{url}/#token={quote(token, safe='')}"


def _derived(token: str, purpose: str) -> str:
    return hmac.new(token.encode(), f"sapo dashboard cookie, {purpose}".encode(), hashlib.sha256).hexdigest()
