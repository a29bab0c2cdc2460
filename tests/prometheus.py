"""Debian's prometheus and promtool, and what the tests ask them."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.documents import ROOT

RULES = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "sapo.json"
START_SECONDS = 30
_SELECTOR = re.compile(r"\b((?:sapo|vllm)[:_][a-zA-Z0-9_:]+)(\{[^}]*\})?")
_VARIABLES = {"$run": ".*", "$__rate_interval": "1m"}


def program(name: str) -> str:
    """Its path; where it is missing, the test is skipped, and fails in CI."""
    found = shutil.which(name)
    if found is None:
        reason = f"{name} is not installed (apt install prometheus)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return found


def promtool() -> str:
    return program("promtool")


# ---- What rules, dashboard and documents ask for


@dataclass(frozen=True)
class Expression:
    where: str
    text: str

    @property
    def selectors(self) -> set[str]:
        """The series that it reads: name{matchers}."""
        return {name + matchers for name, matchers in _SELECTOR.findall(self.text)}


def rules(directory: Path = RULES) -> list[dict[str, Any]]:
    files = [yaml.safe_load(path.read_text()) for path in sorted(directory.glob("*.rules.yml"))]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def of_rules(directory: Path = RULES) -> list[Expression]:
    return [Expression(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules(directory)]


def of_dashboard(path: Path = DASHBOARD) -> list[Expression]:
    found = []
    for panel in json.loads(path.read_text())["panels"]:
        for target in panel.get("targets", []):
            text = target["expr"]
            for name, value in _VARIABLES.items():
                text = text.replace(name, value)
            found.append(Expression(f"panel {panel['title']!r}", text))
    return found


def named_in_documents() -> list[Expression]:
    """Metrics that pages speak of in code marks; not the package."""
    found = []
    for path in (ROOT / "docs" / "monitoring.md", ROOT / "docs" / "metrics.md", ROOT / "docs" / "recovery.md"):
        names = set(re.findall(r"`((?:sapo|vllm)[:_][a-z0-9_:]+)[`{]", path.read_text())) - {"sapo_learner"}
        found += [Expression(path.name, name) for name in sorted(names)]
    return found


# ---- A server


@dataclass
class Prometheus:
    """One that serves at `url`."""

    url: str
    process: "subprocess.Popen[bytes]"

    def ask(self, path: str, **parameters: Any) -> Any:
        """The data of an answer; what is wrong with an expression fails the test."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    def has(self, selector: str, when: "Window") -> bool:
        """Whether any such series was scraped, or written by a rule, in that time."""
        return bool(self.ask("series", **{"match[]": selector}, start=when.start, end=when.end))

    def value(self, expression: str, when: float) -> list[dict[str, Any]]:
        return list(self.ask("query", query=expression, time=when)["result"])


@dataclass(frozen=True)
class Window:
    """Unix times."""

    start: float
    end: float


def missing(asked: list[Expression], prometheus: Prometheus, when: Window) -> list[str]:
    """What they read and no series has, each with who asks."""
    return [
        f"{each.where}: {selector}"
        for each in asked
        for selector in sorted(each.selectors)
        if not any(prometheus.has(form, when) for form in _forms(selector))
    ]


def _forms(selector: str) -> list[str]:
    """Of a histogram that is spoken of as a whole, too."""
    return [selector] if "{" in selector else [selector, f"{selector}_count"]


@contextlib.contextmanager
def running(config: Path, data: Path) -> Iterator[Prometheus]:
    """A server on a free port of this machine."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{holder.getsockname()[1]}"
    process = subprocess.Popen(
        [program("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={data}",
         f"--web.listen-address={address}", "--log.level=warn"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _await_ready(f"http://{address}", process)
        yield Prometheus(f"http://{address}", process)
    finally:
        process.kill()
        process.wait()


def _await_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/-/ready", timeout=5).status_code == 200:
                return
        assert process.poll() is None, "prometheus ended: is its configuration right?"
        assert time.monotonic() < deadline, "prometheus does not become ready"
        time.sleep(0.05)
