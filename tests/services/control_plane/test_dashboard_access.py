"""Who may see the page: without the run's token nobody sees anything, and a browser that has it can only read."""

import re
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from pydantic import SecretStr

from services.control_plane.dashboard.pages import STATIC
from services.runtime.auth import cookie_name, cookie_value
from services.runtime.settings import Environment
from tests.small_run import TOKEN, Running, free_address

READ = ("/v1/history", "/v1/live", "/v1/groups", "/v1/groups/1-1", "/v1/status", "/v1/config")
FILES = sorted(path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*") if path.is_file())
OPEN = {"style.css", "login.js", "icon.svg"}


@pytest_asyncio.fixture
async def anybody(running: Running) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=running.url, timeout=5) as client:
        yield client


@pytest_asyncio.fixture
async def browser(running: Running) -> AsyncIterator[httpx.AsyncClient]:
    """Has logged in."""
    async with httpx.AsyncClient(base_url=running.url, timeout=5) as client:
        answer = await client.post("/login", data={"token": TOKEN})
        assert (answer.status_code, answer.headers["location"]) == (303, "./")
        yield client


@pytest.mark.parametrize("path", READ)
async def test_without_a_token_nothing_is_told(anybody: httpx.AsyncClient, path: str) -> None:
    for headers in ({}, {"Cookie": f"{cookie_name(TOKEN)}=wrong"}, {"Cookie": f"{cookie_name(TOKEN)}={TOKEN}"},
                    {"Authorization": "Bearer wrong"}, {"Cookie": '"; =;;,\x7f'}):  # fmt: skip
        assert (await anybody.get(path, headers=headers)).status_code == 401


async def test_the_page_without_a_token_is_the_login(anybody: httpx.AsyncClient) -> None:
    answer = await anybody.get("/")
    assert answer.status_code == 401
    assert 'action="login"' in answer.text
    assert "Is it learning" not in answer.text


@pytest.mark.parametrize("name", FILES)
async def test_only_what_the_login_needs_is_open(
    anybody: httpx.AsyncClient, browser: httpx.AsyncClient, name: str
) -> None:
    assert (await anybody.get(f"/static/{name}")).status_code == (200 if name in OPEN else 401)
    assert (await browser.get(f"/static/{name}")).status_code == 200


async def test_the_login_page_names_no_file_that_it_may_not_have(anybody: httpx.AsyncClient) -> None:
    named = re.findall(r'(?:src|href)="static/([^"]+)"', (await anybody.get("/")).text)
    assert named
    assert set(named) <= OPEN


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], TOKEN + "x", "é", "\x00"])
async def test_a_wrong_token_gets_no_cookie(anybody: httpx.AsyncClient, token: str) -> None:
    answer = await anybody.post("/login", data={"token": token})
    assert answer.status_code == 401
    assert "Wrong token" in answer.text
    assert "set-cookie" not in answer.headers


async def test_a_login_opens_page_and_api_and_its_cookie_is_not_the_token(browser: httpx.AsyncClient) -> None:
    assert "Is it learning?" in (await browser.get("/")).text
    assert (await browser.get("/v1/history")).status_code == 200
    (cookie,) = browser.cookies.jar
    assert TOKEN not in (cookie.value or "")
    assert cookie.value == cookie_value(TOKEN)


@pytest.mark.parametrize(
    "other", ['foo={"a":1}', "n=Jörg", "flag", "x=a b", "x=1; ; y", 'q="', "=", f"{cookie_name(TOKEN)}=old"]
)
async def test_cookies_of_others_on_the_same_host_lock_nobody_out(anybody: httpx.AsyncClient, other: str) -> None:
    ours = f"{cookie_name(TOKEN)}={cookie_value(TOKEN)}"
    for both in (f"{other}; {ours}", f"{ours}; {other}"):
        assert (await anybody.get("/v1/history", headers={"Cookie": both.encode()})).status_code == 200


async def test_wrong_logins_are_in_the_log_but_do_not_fill_it(
    anybody: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        await anybody.post("/login", data={"token": "guess"})
    assert [each for each in caplog.messages if "wrong token" in each] == [
        "1 logins with a wrong token, the last from 127.0.0.1"
    ]
    assert "guess" not in caplog.text


async def test_the_cookie_is_out_of_reach_for_scripts_and_other_sites(anybody: httpx.AsyncClient) -> None:
    plain = (await anybody.post("/login", data={"token": TOKEN})).headers["set-cookie"]
    assert {"HttpOnly", "Path=/", "SameSite=strict"} <= set(plain.split("; "))
    assert "Secure" not in plain
    forwarded = await anybody.post("/login", data={"token": TOKEN}, headers={"X-Forwarded-Proto": "https"})
    assert "Secure" in forwarded.headers["set-cookie"]


async def test_runs_on_one_machine_do_not_share_a_cookie() -> None:
    assert cookie_name(TOKEN) != cookie_name(TOKEN + "x")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/groups"), ("POST", "/v1/learner"), ("POST", "/v1/leases"), ("POST", "/v1/workers/heartbeat"),
        ("PUT", f"/v1/blobs/{'0' * 64}"), ("POST", "/v1/policies"), ("DELETE", "/v1/groups/1-1"),
    ],
)  # fmt: skip
async def test_the_cookie_writes_nothing(browser: httpx.AsyncClient, method: str, path: str) -> None:
    assert (await browser.request(method, path, json={})).status_code == 401


async def test_a_login_is_small(anybody: httpx.AsyncClient) -> None:
    assert (await anybody.post("/login", data={"token": "x" * 5000})).status_code == 422

    async def unbounded() -> AsyncIterator[bytes]:
        yield b"token="

    assert (await anybody.post("/login", content=unbounded())).status_code == 422


@pytest.mark.parametrize("name", ["../pages.py", "..%2fpages.py", "%2e%2e/pages.py", "/etc/passwd", "vendor", ""])
async def test_no_other_file_is_served(browser: httpx.AsyncClient, name: str) -> None:
    assert (await browser.get(f"/static/{name}")).status_code == 404


async def test_nothing_foreign_and_nothing_inline_may_run(browser: httpx.AsyncClient) -> None:
    answer = await browser.get("/")
    assert answer.headers["content-security-policy"].startswith("default-src 'self';")
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    for name in ("index.html", "login.html"):
        page = (STATIC / name).read_text()
        assert "http://" not in page
        assert "https://" not in page
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=|<style", page)


async def test_an_unchanged_file_is_not_sent_again(browser: httpx.AsyncClient) -> None:
    first = await browser.get("/static/app.js")
    again = await browser.get("/static/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_while_it_starts_it_says_for_what_it_waits(tmp_path) -> None:  # type: ignore[no-untyped-def]
    import asyncio

    from services.control_plane.service import serve
    from services.runtime.lifecycle import Lifecycle
    from tests.small_run import run_config

    address, nobody = free_address(), free_address()
    environment = Environment(redis_url=SecretStr(f"redis://{nobody}"), token=SecretStr(TOKEN), patience_seconds=30)
    lifecycle = Lifecycle()
    task = asyncio.create_task(serve(lifecycle, run_config(tmp_path), environment, listen=address))
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}", timeout=5) as client, asyncio.timeout(20):
            while True:
                try:
                    answer = await client.get("/")
                    if "Redis" in answer.text:
                        break
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.05)
            assert answer.status_code == 503
            assert 'http-equiv="refresh"' in answer.text
            assert (await client.get("/v1/status")).status_code == 401
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
