"""Debian's prometheus and promtool, and what the tests ask them."""

import contextlib
import json
import math
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

from services.runtime.metric_definitions import METRICS
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


def check_metrics(text: str) -> None:
    """Fails for what promtool finds wrong, or unusual, in a /metrics."""
    command = [promtool(), "check", "metrics"]
    checked = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


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


def of_variables(path: Path = DASHBOARD) -> list[Expression]:
    """What the dashboard's own choices are made from: no PromQL, but names."""
    variables = json.loads(path.read_text())["templating"]["list"]
    return [Expression(f"variable {each['name']}", each["definition"]) for each in variables if "definition" in each]


def named_in_documents() -> list[Expression]:
    """Metrics that pages speak of in code marks; not the package."""
    found = []
    for path in (ROOT / "docs" / "monitoring.md", ROOT / "docs" / "metrics.md", ROOT / "docs" / "recovery.md"):
        names = set(re.findall(r"`((?:sapo|vllm)[:_][a-z0-9_:]+)[`{]", path.read_text())) - {"sapo_learner"}
        found += [Expression(path.name, name) for name in sorted(names)]
    return found


def everything() -> list[Expression]:
    return [*of_rules(), *of_dashboard(), *of_variables(), *named_in_documents()]


def defined() -> list[tuple[str, str]]:
    """Name and kind of every metric."""
    return [(each.name, each.kind) for metrics in METRICS.values() for each in metrics]


MAY_BE_ZERO = {
    "sapo_ledger_problems", "sapo_worker_probe_misses_total", "sapo_rollout_probe_misses_total",
    "sapo_ingest_forgotten_groups_total", "sapo_rollout_dropped_samples_total", "sapo_rollout_scoring_failures_total",
    "sapo_weight_sync_failures_total", "sapo_record_writer_lost_lines_total", "sapo_learner_clamped_ratio",
    "sapo_unusable_secret_files",
    "sapo_evaluation_step",  # until the second evaluation
    "sapo_learner_mfu",  # the peak of a CPU is not known
}  # fmt: skip


# ---- A server


@dataclass(frozen=True)
class Window:
    """Unix times."""

    start: float
    end: float


@dataclass
class Prometheus:
    """One that serves at `url`; asked of what was scraped, or written by a rule, in the time `when`."""

    url: str
    when: Window

    def ask(self, path: str, **parameters: Any) -> Any:
        """The data of an answer; what is wrong with an expression fails the test."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    def has(self, selector: str) -> bool:
        return bool(self.ask("series", **{"match[]": selector}, start=self.when.start, end=self.when.end))

    def values(self, expression: str) -> list[dict[str, Any]]:
        """Of every second."""
        window = {"start": self.when.start, "end": self.when.end, "step": 1}
        return list(self.ask("query_range", query=expression, **window)["result"])


def missing(asked: list[Expression], prometheus: Prometheus) -> list[str]:
    """What they read and no series has, each with who asks."""
    return [
        f"{each.where}: {selector}"
        for each in asked
        for selector in sorted(each.selectors)
        if not any(prometheus.has(form) for form in _forms(selector))
    ]


def _forms(selector: str) -> list[str]:
    """Of a histogram that is spoken of as a whole, too."""
    return [selector] if "{" in selector else [selector, f"{selector}_count"]


@dataclass
class Scrape:
    """What a server has seen of a run until it was killed: its files, the time, the rules' state at the end."""

    data: Path
    when: Window
    rules: list[dict[str, Any]]


@contextlib.contextmanager
def scraping(directory: Path, run: Path) -> Iterator[Scrape | None]:
    """With the repository's own configuration, but every second; killed -9 at the end. None: it is not installed."""
    if shutil.which("prometheus") is None:
        yield None
        return
    shutil.copytree(RULES, directory)
    config = directory / "prometheus.yml"
    config.write_text(config.read_text().replace("_interval: 5s\n", "_interval: 1s\n"))
    (directory / "targets" / "run.json").symlink_to(run / "prometheus-targets.json")
    started = time.time()
    with running(config, directory / "data") as prometheus:
        yield (scrape := Scrape(directory / "data", prometheus.when, []))
        scrape.when = Window(started, time.time())
        scrape.rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]


@contextlib.contextmanager
def looking_back(scrape: Scrape | None) -> Iterator[Prometheus]:
    """Its files, served again by a server that scrapes nothing."""
    program("prometheus")
    assert scrape is not None
    config = scrape.data.parent / "nothing.yml"
    config.write_text("scrape_configs: []\n")
    with running(config, scrape.data) as prometheus:
        prometheus.when = scrape.when
        yield prometheus


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
        yield Prometheus(f"http://{address}", Window(time.time(), math.inf))
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
