"""What was seen, and the page that it becomes. A part that is run alone replaces its own section of the page."""

import os
import platform
import re
import shlex
from dataclasses import dataclass, field
from datetime import UTC, datetime

from containers import ROOT, run

RESULTS = ROOT / "benchmarks" / "results" / "deploy.md"
KILLS = """
kill -9 of each container's first process, from the host, while it trains; podman's restart policy alone brings it back.
Recovered: it runs again, and five more steps were done. Where it takes about a minute, that is `pacing.lease_seconds`:
so long draws are waited for that a killed control plane had granted unheard.

| killed | at step | recovered after, s |
|---|---|---|"""
_SECTION = re.compile(r"^## (\w+)\n\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


@dataclass
class Report:
    part: str = "Images"  # the one that goes on
    stand_ins: list[str] = field(default_factory=list)
    images: list[tuple[str, float]] = field(default_factory=list)  # name, megabytes
    facts: dict[str, list[str]] = field(default_factory=dict)  # by part
    kills: list[tuple[str, float, int]] = field(default_factory=list)  # container, seconds until it recovered, step
    failures: list[str] = field(default_factory=list)

    def note(self, what: str) -> None:
        self.facts.setdefault(self.part, []).append(what)

    def check(self, holds: bool, what: str) -> None:
        line = f"{'yes' if holds else '**NO**'}: {what}"
        self.note(line)
        print(f"{self.part}: {line}", flush=True)
        if not holds:
            self.failures.append(f"{self.part}: {what}")

    def write(self) -> None:
        sections = dict(_SECTION.findall(RESULTS.read_text())) if RESULTS.exists() else {}
        sections |= self._sections()
        body = [
            f"## {title}\n\n{sections[title].strip()}\n\n"
            for title in ("Images", "Demo", "Kills", "Kubernetes")
            if title in sections
        ]
        RESULTS.write_text("".join([self._head(), *body]).rstrip() + "\n")

    def _head(self) -> str:
        podman = run("podman", "--version").strip()
        compose = run(*shlex.split(os.environ.get("COMPOSE", "docker compose")), "version", "--short").strip()
        lines = ["# What images and compose file do", "", "    deploy/test/run", ""]
        lines += [
            f"{os.cpu_count()} cores ({platform.machine()}), shared with other work; {podman}, Compose {compose}."
        ]
        if self.stand_ins:
            lines += ["In place of images from a registry:", "", *(f"- {each}" for each in self.stand_ins)]
            lines += ["- Grafana: nothing; it is not in Debian, so it was left out and is untested"]
        return "\n".join([*lines, "", ""])

    def _sections(self) -> dict[str, str]:
        """Of the parts that were run."""
        rows = [f"| `{name}` | {size:.0f} |" for name, size in self.images]
        made = {"Images": "\n".join(["| image | MB, unpacked |", "|---|---|", *rows])} if rows else {}
        for part, facts in self.facts.items():
            made[part] = "\n".join([f"{datetime.now(UTC):%Y-%m-%d}.", "", *(f"- {fact}" for fact in facts)])
        if self.kills:
            table = [KILLS, *(f"| {name} | {step} | {seconds:.0f} |" for name, seconds, step in self.kills)]
            made["Kills"] = "\n".join([made.get("Kills", ""), *table])
        return made
