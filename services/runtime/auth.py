"""The run's tokens: those that a server knows, the one that a client sends, and the cookie that a browser gets."""

import hashlib
import hmac
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib.parse import quote

from sapo_learner.errors import ConfigError, Unauthenticated
from services.runtime.roles import Role
from services.runtime.watched import Watched

SHORTEST = 16  # characters of a token in a file
ROTATION_SECONDS = 120.0  # for which a client whose token is in a file waits for it to be another, or to be known
VIEWERS = (Role.VIEWER, Role.ADMIN)


class _Known(NamedTuple):
    """What a server keeps of a token: enough to recognise it, and the cookie of a browser that logged in with it."""

    digest: bytes  # of `Bearer TOKEN`
    role: Role
    cookie: tuple[str, str]  # name and value


class Tokens:
    """Those that a server accepts, each with its role; read again when their file changes."""

    def __init__(self, known: Callable[[], list[_Known]]) -> None:
        self._known = known

    @classmethod
    def one(cls, token: str) -> "Tokens":
        """A single token, which may do everything."""
        known = [_known(token, Role.ADMIN)]
        return cls(lambda: known)

    @classmethod
    def in_file(cls, path: str) -> "Tokens":
        """Lines `ROLE: TOKEN`, several of a role where tokens are being exchanged. Raises ConfigError."""
        return cls(Watched([("SAPO_TOKENS_FILE", path)], lambda contents: _parsed(contents[0], path)).get)

    @classmethod
    def of_token_file(cls, path: str) -> "Tokens":
        """A file with a single token, which may do everything. Raises ConfigError."""
        watched = Watched([("SAPO_TOKEN_FILE", path)], lambda contents: [_known(_alone(contents[0], path), Role.ADMIN)])
        return cls(watched.get)

    def role(self, header: bytes) -> Role | None:
        """Of the token in an `authorization` header or metadata entry; None: it is none of ours. In constant time."""
        given, found = hashlib.sha256(header).digest(), None
        for each in self._known():
            if hmac.compare_digest(each.digest, given):
                found = each.role
        return found

    def login(self, token: str) -> tuple[Role | None, tuple[str, str]]:
        """The token's role, and name and value of the cookie that stands for it."""
        return self.role(_header(token)), _cookie(token)

    def has_cookie(self, header: bytes) -> bool:
        """Whether a `cookie` header holds one that stands for a token with which one may look.

        In constant time. Other cookies of the same host, whatever they look like, do no harm: a parser of them all
        would stop at the first that is odd.
        """
        pairs = [pair.strip().partition("=") for pair in header.decode("latin-1").split(";")]
        ours = [each.cookie for each in self._known() if each.role in VIEWERS]
        return any(
            hmac.compare_digest(given.encode(), value.encode())
            for found, _, given in pairs
            for name, value in ours
            if found == name
        )


class Credential:
    """The token that a client sends: one that never changes, or a file's, read again when a server refuses it."""

    def __init__(self, token: str = "", *, file: str = "") -> None:
        self._token = token
        self._file = Watched([("SAPO_TOKEN_FILE", file)], lambda contents: _alone(contents[0], file)) if file else None
        self._refused_since: float | None = None

    @property
    def header(self) -> str:
        """Value of the `authorization` header or metadata entry."""
        return f"Bearer {self.token}"

    @property
    def token(self) -> str:
        return self._file.get() if self._file else self._token

    def refused(self) -> bool:
        """To be called when a server does not know the token: whether to try again.

        The file may hold another by now, or the server may not have read its own yet.
        """
        if self._file is None:
            return False
        self._file.get(now=True)
        if self._refused_since is None:
            self._refused_since = time.monotonic()
        return time.monotonic() - self._refused_since < ROTATION_SECONDS

    def accepted(self) -> None:
        """To be called when a server has answered."""
        self._refused_since = None


def wrong_token() -> Unauthenticated:
    """Whichever way it came."""
    return Unauthenticated(
        "wrong or missing token",
        where="Authorization header",
        fix="set SAPO_TOKEN to the run's (that of a `sapo up` is in services.json of its directory)",
    )


def cookie_name(token: str) -> str:
    """Another one for every token: cookies do not tell ports apart, and several runs may be on one machine."""
    return f"sapo-{_derived(token, 'name')[:12]}"


def cookie_value(token: str) -> str:
    """What only those know who know the token, and from which nobody finds the token."""
    return _derived(token, "value")


def page_address(url: str, token: str) -> str:
    """Of the dashboard, login included: what follows # never leaves the browser, where the page reads the token."""
    return f"{url}/#token={quote(token, safe='')}"


def _derived(token: str, purpose: str) -> str:
    return hmac.new(token.encode(), f"sapo dashboard cookie, {purpose}".encode(), hashlib.sha256).hexdigest()


def _cookie(token: str) -> tuple[str, str]:
    return cookie_name(token), cookie_value(token)


def _header(token: str) -> bytes:
    return f"Bearer {token}".encode()


def _known(token: str, role: Role) -> _Known:
    return _Known(hashlib.sha256(_header(token)).digest(), role, _cookie(token))


def _parsed(content: bytes, path: str) -> list[_Known]:
    known = [_known(token, role) for role, token in _lines(content, path)]
    if not known:
        raise ConfigError("no token in it", where=path, fix="write lines like `worker: TOKEN`")
    if len({each.digest for each in known}) < len(known):
        raise ConfigError("a token stands there twice", where=path, fix="give every role tokens of its own")
    return known


def _lines(content: bytes, path: str) -> Iterator[tuple[Role, str]]:
    """Role and token of each line. What is wrong with one is said without what stands in it: that may be a token."""
    for number, line in enumerate(content.decode("ascii", "replace").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{path}, line {number}"
        name, separator, token = (part.strip() for part in line.partition(":"))
        if not separator or name not in list(Role):
            roles = ", ".join(Role)
            raise ConfigError("not `ROLE: TOKEN`", where=where, fix=f"roles are {roles}")
        yield Role(name), _fit(token, where)


def _alone(content: bytes, path: str) -> str:
    return _fit(content.decode("ascii", "replace").strip(), path)


def _fit(token: str, where: str) -> str:
    if len(token) < SHORTEST or not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(
            f"a token has at least {SHORTEST} printable ASCII characters, without spaces", where=where,
            fix="make one: openssl rand -hex 24",
        )  # fmt: skip
    return token
