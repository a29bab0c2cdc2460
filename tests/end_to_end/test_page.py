"""The dashboard in a real browser: beside a run that goes on, loses a worker, and stops."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from sapo_learner.policy import tiny_policy, write_policy
from services.control_plane.workers import TTL_SECONDS
from tests.recorded import ALPHABET
from tests.shown_group import shown_group

pytestmark = pytest.mark.timeout(300)
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


def require_browser() -> str:
    """Path of chromium. Skips where it is missing, fails in CI."""
    chromium, reason = shutil.which("chromium"), "needs chromium and playwright (apt-get install chromium)"
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        chromium = None
    if chromium is None:
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return chromium


@dataclass
class Up:
    """A `sapo up` and what it has printed."""

    directory: Path
    process: "subprocess.Popen[str]"
    log: Path

    @property
    def address(self) -> str:
        """Of the page, with the login, as a user finds it."""
        return until(lambda: re.search(r"^dashboard: (\S+)$", self.log.read_text(), re.MULTILINE), 60)[1]

    def services(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "services.json").read_text()))

    def step(self) -> int:
        record = self.directory / "record.jsonl"
        lines = record.read_text().splitlines() if record.exists() else []
        return max((line["step"] for line in map(json.loads, lines) if line["kind"] == "step"), default=0)


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def chromium() -> str:
    return require_browser()


@pytest.fixture(scope="module")
def up(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A run of a random tiny policy that goes on until it is stopped."""
    root = tmp_path_factory.mktemp("page")
    write_policy(tiny_policy(ALPHABET, seed=0), root / "model")
    problems = [json.dumps({"prompt": f"{number}+1=", "answer": "1"}) for number in range(200)]
    (root / "problems.jsonl").write_text("\n".join(problems))
    (root / "held-out.jsonl").write_text("\n".join(problems[:4]))
    task = {"name": "jsonl", "path": str(root / "problems.jsonl"), "held_out_path": str(root / "held-out.jsonl"),
            "match": "regex", "pattern": "(.)"}  # fmt: skip
    settings = {
        "run": {"name": "page", "dir": str(root / "run")}, "policy": {"source": str(root / "model")}, "task": task,
        "training": {"steps": 100_000, "groups_per_step": 4, "max_policy_age": 4},
        "sampling": {"group_size": 8, "max_tokens": 12},
        "evaluation": {"every": 5, "samples": 8, "boundary_samples": 8},
        "pacing": {"lease_seconds": 5},  # a killed worker's draws hold the others up for so long
    }  # fmt: skip
    (root / "run.yaml").write_text(json.dumps(settings))
    log = root / "up.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "services.cli", "up", str(root / "run.yaml")]
        process = subprocess.Popen(command, stdout=output, stderr=output, text=True, start_new_session=True)
    try:
        yield Up(root / "run", process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGINT)
            process.wait(30)


class Tab:
    """A page and everything that it complained of."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).inner_text())

    def step(self) -> int:
        """That the page says training is at."""
        found = re.match(r"step (\d+)", self.text("#step"))
        return int(found[1]) if found else 0

    def drawn(self, panel: str) -> int:
        """Step of the last point of a panel."""
        found = re.search(r"at step (\d+)", self.text(f"#panel-{panel} .legend"))
        return int(found[1]) if found else 0

    def worker(self, name: str) -> str:
        rows = [row for row in self.text("#workers").splitlines() if row.startswith(name)]
        return rows[0] if rows else ""


@dataclass
class Browser:
    chromium: Any
    opened: list[Any] = field(default_factory=list)

    def open(self, address: str, *, phone: bool = False, dark: bool = False) -> Tab:
        context = self.chromium.new_context(
            viewport={"width": 390, "height": 844} if phone else {"width": 1400, "height": 900},
            color_scheme="dark" if dark else "light",
        )
        self.opened.append(context)
        tab = Tab(context.new_page())
        tab.page.goto(address)
        tab.page.wait_for_selector("#connection.good", timeout=30_000)
        return tab


@pytest.fixture(scope="module")
def launch(chromium: str) -> Iterator[Callable[..., Any]]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield lambda *arguments: playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", *arguments])


@pytest.fixture(scope="module")
def running_browser(launch: Callable[..., Any]) -> Iterator[Any]:
    running = launch()
    yield running
    running.close()


@pytest.fixture
def browser(running_browser: Any) -> Iterator[Browser]:
    browser = Browser(running_browser)
    yield browser
    for context in browser.opened:
        context.close()


def test_the_address_that_up_prints_logs_in_by_itself_and_hides_the_token(up: Up, browser: Browser) -> None:
    tab = browser.open(up.address)
    assert "token" not in tab.page.url
    assert tab.text("#run") == "page"
    refused = [each for each in tab.complaints if "401" not in each]  # the login page itself is one
    assert not refused


def test_curves_move_while_it_trains_and_a_reload_keeps_them(up: Up, browser: Browser) -> None:
    tab = browser.open(up.address)
    until(lambda: tab.step() >= 3, 60)
    seen = until(lambda: tab.drawn("reward"))
    until(lambda: tab.drawn("reward") > seen)
    assert tab.page.locator("#panel-reward canvas").count() == 1
    until(lambda: tab.drawn("pass_at_1") > 0, 60)
    until(lambda: "balances" in tab.text("#ledger"))
    before = tab.drawn("reward")
    tab.page.reload()
    tab.page.wait_for_selector("#connection.good")
    until(lambda: tab.drawn("reward") >= before)
    history = tab.page.evaluate("fetch('v1/history').then((answer) => answer.json())")
    assert history["steps"]["x"][0] == 1
    assert len(history["steps"]["x"]) >= before


def test_a_killed_worker_shows_as_gone_and_comes_back(up: Up, browser: Browser) -> None:
    tab = browser.open(up.address)
    until(lambda: "heard" in tab.worker("rollout-0"), 60)
    up.process.send_signal(signal.SIGSTOP)  # or it would be there again before anybody saw
    try:
        os.kill(up.services()["processes"]["rollout-0"]["pid"], signal.SIGKILL)
        until(lambda: "silent" in tab.worker("rollout-0"), TTL_SECONDS)
        until(lambda: "gone" in tab.worker("rollout-0"), TTL_SECONDS + 10)
    finally:
        up.process.send_signal(signal.SIGCONT)
    until(lambda: "heard" in tab.worker("rollout-0"), 60)
    assert not [each for each in tab.complaints if "401" not in each]


def test_a_tab_in_the_background_holds_no_connection_and_catches_up(up: Up, browser: Browser) -> None:
    """Or the seventh tab of a browser would wait for ever."""
    tab = browser.open(up.address)
    until(lambda: tab.step() > 0, 60)
    turn = "(away) => {{ {} }}".format(
        "Object.defineProperty(document, 'hidden', { value: away, configurable: true });"
        "document.dispatchEvent(new Event('visibilitychange'));"
    )
    others = [browser.open(up.address)]
    for _ in range(7):  # in one context: with connections of their own they would find none left
        others[-1].page.evaluate(turn, True)
        page = others[0].page.context.new_page()
        page.goto(up.address)
        page.wait_for_selector("#connection.good", timeout=30_000)
        others.append(Tab(page))
    before = up.step()
    until(lambda: up.step() > before)
    others[0].page.evaluate(turn, False)
    until(lambda: others[0].step() > before)


def test_a_trained_group_is_there_with_coloured_tokens_and_their_numbers(up: Up, browser: Browser) -> None:
    tab = browser.open(up.address)
    tab.page.wait_for_selector("#group-rows button", timeout=60_000)
    tab.page.locator("#group-rows button").first.click()
    tab.page.wait_for_selector(".response .tokens span")
    assert tab.page.locator(".response").count() == 8
    tab.page.select_option("#colour-by", "advantage")
    coloured = tab.page.locator(".response .tokens span:is(.low, .lower, .higher, .high)")
    assert coloured.count() > 0
    coloured.first.hover()
    told = tab.text(".detail")
    assert all(name in told for name in ("ratio", "advantage", "version", "log-prob", "gate weight"))
    tab.page.locator(".response .tokens span").first.click()
    assert "response 0, token 0" in tab.text(".detail")
    tab.page.keyboard.press("ArrowRight")
    assert "response 0, token 1" in tab.text(".detail")


def test_rows_stay_with_their_focus_when_others_come(up: Up, browser: Browser) -> None:
    tab = browser.open(up.address)
    tab.page.wait_for_selector("#group-rows button", timeout=60_000)
    entry = tab.page.evaluate("""() => {
        const row = document.querySelector("#group-rows tr");
        row.querySelector("button").focus();
        row.seen = true;
        return row.dataset.entry;
    }""")
    until(lambda: tab.page.locator("#group-rows tr").first.get_attribute("data-entry") != entry)
    focused = "document.activeElement.closest('#group-rows tr')"
    assert tab.page.evaluate(f"{focused}.seen && {focused}.dataset.entry") == entry


def test_what_the_objective_does_is_drawn_wherever_the_page_is_loaded(up: Up, browser: Browser) -> None:
    tab = browser.open(up.address)
    tab.page.click("nav >> text=Objective")
    tab.page.reload()
    for panel in ("weight_by_ratio", "ratio_by_sign", "ratio_by_age", "kl"):
        tab.page.locator(f"#panel-{panel}").scroll_into_view_if_needed(timeout=30_000)
        tab.page.wait_for_selector(f"#panel-{panel} canvas", timeout=30_000)


def test_text_of_a_response_is_only_ever_text(up: Up, browser: Browser) -> None:
    services = up.services()
    group = shown_group("999999-1", task=HOSTILE, worker=HOSTILE).model_dump()
    group["prompt"]["text"] = HOSTILE
    group["responses"][0]["tokens"]["text"] = [HOSTILE] * 3
    headers = {"Authorization": f"Bearer {services['token']}"}
    url = f"{services['control_plane_url']}/v1/groups"
    assert httpx.post(url, json=group, headers=headers, timeout=10).status_code == 200
    tab = browser.open(up.address)
    tab.page.locator("#group-rows button", has_text="999999-1").click()
    tab.page.wait_for_selector(".response .tokens span")
    assert HOSTILE in tab.text("#group")
    assert tab.page.locator("main img, main script").count() == 0
    assert "taken" not in tab.page.title()


@pytest.mark.parametrize("phone", [False, True])
def test_nothing_sticks_out_in_light_or_dark(up: Up, browser: Browser, phone: bool) -> None:
    grounds = []
    for dark in (False, True):
        tab = browser.open(up.address, phone=phone, dark=dark)
        until(lambda: tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth"))  # noqa: B023
        grounds.append(tab.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]


def test_a_wrong_token_is_told_and_the_right_one_gets_in(up: Up, browser: Browser) -> None:
    page = browser.chromium.new_context().new_page()
    page.goto(up.address.partition("#")[0])
    page.fill("#token", "wrong")
    page.click("button")
    assert page.inner_text(".wrong") == "Wrong token."
    page.fill("#token", up.services()["token"])
    page.click("button")
    page.wait_for_selector("#connection.good", timeout=30_000)


def test_a_browser_that_dies_is_not_noticed(up: Up, launch: Callable[..., Any]) -> None:
    """Killed in the middle of its news; training goes on."""
    Browser(launch("--to-be-killed")).open(up.address)
    before = up.step()
    dying = [each for each in psutil.Process().children(recursive=True) if "--to-be-killed" in each.cmdline()]
    assert dying
    for each in dying:
        each.kill()
    until(lambda: up.step() > before + 2, 30)


def test_the_page_works_after_the_run(up: Up, browser: Browser) -> None:
    """Last: it stops the run."""
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(60) == 0
    command = [sys.executable, "-m", "services.cli", "dashboard", str(up.directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stdout is not None
            tab = browser.open(serving.stdout.readline().strip())
            until(lambda: tab.drawn("reward") == up.step())
            assert tab.text("#state") == "stopped"
            tab.page.locator("#group-rows button").nth(1).click()
            tab.page.wait_for_selector(".response .tokens span")
        finally:
            serving.send_signal(signal.SIGINT)
        assert serving.wait(20) == 0
