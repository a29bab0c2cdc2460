"""The page and its files, and the login before them: `GET /`, `POST /login`, `GET /static/...`.

Everything is read once, from the package. Only what the login page needs is served to whoever asks.
"""

import asyncio
import hashlib
import html
import logging
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qs

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from sapo_learner.errors import ConfigError, NotFound, Unauthenticated
from services.runtime.auth import VIEWERS, Tokens
from services.runtime.seldom import Seldom
from services.runtime.stated_length import stated_length

log = logging.getLogger(__name__)
STATIC = Path(__file__).parent / "static"
OPEN = frozenset({"style.css", "login.js", "icon.svg"})
MAX_FORM_BYTES, FORM_SECONDS = 4096, 10.0
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept, but asked for: another version of the page may be served here by then
}
_WAITING = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="2">
<meta name="viewport" content="width=device-width"><title>sapo: starting</title></head>
<body><h1>The control plane is starting</h1><p>{waiting}</p><p>This page loads itself again.</p></body></html>"""


class Pages:
    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._note = Seldom()
        found = {path.relative_to(STATIC).as_posix(): path for path in STATIC.rglob("*") if path.is_file()}
        self._files = {name: path.read_bytes() for name, path in found.items()}

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route("/", self._index, methods=["GET", "HEAD"], include_in_schema=False)
        app.add_api_route("/login", self._login, methods=["POST"], include_in_schema=False)
        app.add_api_route("/static/{name:path}", self._static, methods=["GET", "HEAD"], include_in_schema=False)

    async def _index(self, request: Request) -> Response:
        if not self._knows(request):
            return self._login_page(401)
        return self._file("index.html", request)

    async def _static(self, name: str, request: Request) -> Response:
        if name not in OPEN and not self._knows(request):
            raise Unauthenticated("not logged in", where=request.url.path, fix="load the page itself")
        return self._file(name, request)

    async def _login(self, request: Request) -> Response:
        """A form with the field `token`."""
        length = stated_length(request.headers)
        if length is None or length > MAX_FORM_BYTES:
            raise ConfigError(f"a login states a length of at most {MAX_FORM_BYTES} bytes", where="/login")
        try:
            async with asyncio.timeout(FORM_SECONDS):  # of somebody who has no token yet
                form = await request.body()
        except TimeoutError:
            raise ConfigError(f"the form did not come within {FORM_SECONDS:g} s", where="/login") from None
        given = parse_qs(form.decode("utf-8", "replace")).get("token", [""])[0]
        role, (name, value) = self._tokens.login(given.strip())
        if role is None:
            self._note_wrong(request)
            return self._login_page(401, wrong="Wrong token.")
        if role not in VIEWERS:
            return self._login_page(403, wrong=f"This is a token of role {role}: the page wants one of a viewer.")
        answer = RedirectResponse("./", status_code=303, headers=HEADERS)
        answer.set_cookie(
            name, value, path="/", httponly=True, samesite="strict",
            secure="https" in (request.url.scheme, request.headers.get("x-forwarded-proto", "")),
        )  # fmt: skip
        return answer

    def _note_wrong(self, request: Request) -> None:
        """In the log, but once a minute however many there are."""
        if count := self._note.due():
            who = request.client.host if request.client else "somewhere"
            log.warning("%d logins with a wrong token, the last from %s", count, who)

    def _login_page(self, status: int, *, wrong: str = "") -> Response:
        page = self._files["login.html"].decode()
        return HTMLResponse(page.replace("<!-- wrong -->", wrong), status, HEADERS)

    def _file(self, name: str, request: Request) -> Response:
        content = self._files.get(name)
        if content is None:
            raise NotFound("no such file", where=request.url.path, fix="load the page again")
        headers = HEADERS | {"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        kind = mimetypes.guess_type(name)[0] or "text/plain"
        return Response(content, headers=headers, media_type="text/javascript" if name.endswith(".js") else kind)

    def _knows(self, request: Request) -> bool:
        return self._tokens.has_cookie(request.headers.get("cookie", "").encode("latin-1"))


def starting_page(waiting: Sequence[str]) -> Response:
    """While the control plane waits: for what, and once more in two seconds."""
    said = html.escape("; ".join(waiting) or "nothing any more")
    return HTMLResponse(_WAITING.format(waiting=f"It waits for: {said}."), 503, HEADERS | {"Retry-After": "2"})
