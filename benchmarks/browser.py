"""A real browser for benchmarks, and its processes."""

import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
from playwright.async_api import Browser, BrowserContext, Page, async_playwright

PATIENCE_MILLISECONDS = 300_000  # on a busy machine a browser takes its time


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        raise SystemExit("chromium is missing: apt-get install chromium")
    async with async_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        browser = await playwright.chromium.launch(executable_path=path, args=arguments, timeout=PATIENCE_MILLISECONDS)
        try:
            yield browser
        finally:
            for each in browser_processes():  # held back it would take its time to close
                with contextlib.suppress(psutil.Error):
                    each.kill()


def browser_processes() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if "chrom" in each.name()]


def hold_back() -> None:
    """Every thread of the browser gets what is left; and its session, for Linux weighs sessions against one another."""
    for each in browser_processes():
        with contextlib.suppress(psutil.Error, OSError):
            for thread in each.threads():
                os.sched_setscheduler(thread.id, os.SCHED_IDLE, os.sched_param(0))
            if os.getsid(each.pid) != os.getsid(0):
                Path(f"/proc/{each.pid}/autogroup").write_text("19")


async def opened(context: BrowserContext, address: str) -> Page:
    page = await context.new_page()
    page.set_default_timeout(PATIENCE_MILLISECONDS)
    await page.goto(address)
    await page.wait_for_selector("#connection.good")
    return page


def renderers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    found = []
    for each in children:
        with contextlib.suppress(psutil.Error):
            if "--type=renderer" in each.cmdline():
                found.append(each)
    return found


def resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
