"""`deploy/test/run`: images built, the demo run by Compose to its end, every container killed in turn; the report."""

import argparse
import contextlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bases import PYTHON, make_stand_ins
from containers import ROOT, Failed, Stack, build, eventually, podman, run

RESULTS = ROOT / "benchmarks" / "results" / "deploy.md"
PASS_AT_1 = 0.90
IMAGES = {
    "control-plane": ("control-plane.Dockerfile", []),
    "learner": ("learner.Dockerfile", []),
    "rollout-vllm": ("rollout-vllm.Dockerfile", ["LOCK=rollout-vllm-cpu"]),
}
DEMO_SECONDS, RECOVERY_SECONDS = 3600, 600
CONTROL_PLANE = "http://127.0.0.1:8080"  # inside its container
Say = Callable[[str], None]


@dataclass
class Report:
    """What was seen; a part that did not hold is in `failures` too."""

    stand_ins: dict[str, str] = field(default_factory=dict)
    images: list[tuple[str, float]] = field(default_factory=list)
    facts: dict[str, list[str]] = field(default_factory=dict)
    kills: list[tuple[str, float, int]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def check(self, part: str, holds: bool, what: str) -> None:
        self.facts.setdefault(part, []).append(f"{'yes' if holds else '**NO**'}: {what}")
        print(f"{part}: {'yes' if holds else 'NO'}: {what}", flush=True)
        if not holds:
            self.failures.append(f"{part}: {what}")


def build_images(report: Report, options: argparse.Namespace) -> None:
    for name in options.image or ["control-plane", "learner"]:
        dockerfile, arguments = IMAGES[name]
        revision = run("git", "rev-parse", "HEAD").strip()
        given = [f"PYTHON_IMAGE={options.python_image}", f"REVISION={revision}", *arguments, *options.build_arg]
        started = time.monotonic()
        build(f"sapo/{name}:dev", ROOT / "deploy" / "docker" / dockerfile, options.volume, *given)
        print(f"built sapo/{name} in {time.monotonic() - started:.0f} s", flush=True)


def measure_images(report: Report, python_image: str) -> None:
    listed = json.loads(run("podman", "images", "--format", "json"))
    sizes = {name: each["Size"] / 1e6 for each in listed for name in each.get("Names") or []}
    wanted = {f"localhost/sapo/{name}:dev": f"sapo/{name}" for name in IMAGES} | {
        python_image: f"{python_image} (base)"
    }
    report.images = [(shown, sizes[name]) for name, shown in wanted.items() if name in sizes]


def status(stack: Stack) -> dict[str, Any]:
    return dict(stack.sapo("status", CONTROL_PLANE))


def demo(stack: Stack, report: Report) -> None:
    """The demo of README, to its end."""
    started = time.monotonic()
    eventually("the demo ends", DEMO_SECONDS, lambda: status(stack)["state"] == "finished")
    seconds, last = time.monotonic() - started, status(stack)["evaluations"][-1]
    report.check("demo", True, f"finished {seconds:.0f} s after the containers were up")
    report.check(
        "demo", last["pass_at_1"] >= PASS_AT_1, f"final pass@1 {last['pass_at_1']:.3f} (bar {PASS_AT_1}), step {last['step']}"
    )  # fmt: skip
    ledger = stack.sapo("ledger", "/runs/demo", service="control-plane")
    report.check(
        "demo",
        ledger["balanced"],
        f"ledger balanced, draw by draw: {ledger['trained']} trained of {ledger['accepted']}",
    )
    (learner,) = stack.containers("learner").values()
    eventually("the learner ends", 120, lambda: not stack.containers("learner")[learner["Name"]]["State"]["Running"])
    (learner,) = stack.containers("learner").values()
    report.check("demo", learner["State"]["ExitCode"] == 0, f"the learner ended with {learner['State']['ExitCode']}")
    others = [each for each in stack.containers().values() if each["Name"].split("-")[1] not in ("learner", "secrets")]
    report.check("demo", all(each["State"]["Running"] and not each["RestartCount"] for each in others),
                 f"the {len(others)} others run, none was restarted")  # fmt: skip
    report.check(
        "demo",
        all(each["State"].get("OOMKilled") is False for each in stack.containers().values()),
        "no memory limit was reached",
    )


def targets() -> list[str]:
    """Processes that Prometheus reaches."""
    with urllib.request.urlopen("http://127.0.0.1:9090/api/v1/query?query=up==1", timeout=10) as answer:
        return sorted(each["metric"]["job"] for each in json.load(answer)["data"]["result"])


def is_locked_down(stack: Stack, report: Report) -> None:
    for name, each in stack.containers().items():
        if "-secrets-" in name:
            continue
        host, user = each["HostConfig"], each["Config"]["User"]
        if not (host["ReadonlyRootfs"] and not each["EffectiveCaps"] and user not in ("", "root", "0")):
            report.check(
                "lock-down",
                False,
                f"{name}: read-only {host['ReadonlyRootfs']}, {each['EffectiveCaps']}, user {user!r}",
            )
            return
    report.check("lock-down", True, "every container: read-only root, no capability, a user that is not root")


def kills(stack: Stack, report: Report) -> None:
    """kill -9 of each container's first process, from outside; podman's restart policy alone brings it back."""
    eventually("training begins", DEMO_SECONDS, lambda: steps(stack) >= 3)
    is_locked_down(stack, report)
    eventually("Prometheus reaches five processes", 120, lambda: len(targets()) == 5)
    report.check("monitoring", True, f"Prometheus scrapes {', '.join(targets())}")
    for name in [each for each in stack.containers() if "-secrets-" not in each]:
        before, restarts = steps(stack), stack.containers()[name]["RestartCount"]
        os.kill(stack.containers()[name]["State"]["Pid"], signal.SIGKILL)

        def recovered(name: str = name, before: int = before, restarts: int = restarts) -> bool:
            each = stack.containers()[name]
            return each["State"]["Running"] and each["RestartCount"] > restarts and steps(stack) >= before + 5

        try:
            report.kills.append((name, eventually(f"{name} recovers", RECOVERY_SECONDS, recovered), before))
        except Failed as error:
            report.failures.append(f"kills: {error}")
            return
        print(f"killed {name} at step {before}: recovered in {report.kills[-1][1]:.0f} s", flush=True)
    drain(stack, report)


def steps(stack: Stack) -> int:
    return int(status(stack)["learner"]["step"])


def drain(stack: Stack, report: Report) -> None:
    """SIGTERM: workers and learner finish what they do, save, and end with 0."""
    step = steps(stack)
    stack.compose("stop", "rollout", "learner")
    ended = {**stack.containers("rollout"), **stack.containers("learner")}
    codes = {name: each["State"]["ExitCode"] for name, each in ended.items()}
    report.check(
        "kills", not any(codes.values()), f"docker compose stop at step {step}: exit codes {sorted(codes.values())}"
    )
    ledger = stack.sapo("ledger", "/runs/kills", service="control-plane")
    accepted = ", ".join(f"{ledger[kind]} {kind}" for kind in ("accepted", "trained", "degenerate", "backlog"))
    report.check("kills", ledger["balanced"], f"ledger balanced, draw by draw, after all kills: {accepted}")


def run_parts(report: Report, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory, podman():
        if options.stand_ins:
            report.stand_ins = make_stand_ins()
        if "build" in options.part:
            build_images(report, options)
        measure_images(report, options.python_image)
        if not {"demo", "kills"} & set(options.part):
            return
        # Endless: it is stopped, not awaited.
        text = (ROOT / "deploy/examples/demo.yaml").read_text()
        endless = Path(directory) / "kills.yaml"
        endless.write_text(text.replace("name: demo", "name: kills").replace("steps: 150", "steps: 100000"))
        with Stack("sapo", keep=options.keep) as stack:
            if "demo" in options.part:
                stack.up()
                demo(stack, report)
            if "kills" in options.part:
                stack.up(SAPO_RUN=str(endless))
                kills(stack, report)


def write(report: Report, options: argparse.Namespace) -> None:
    lines = [
        "# What the images and the compose file do", "", f"    deploy/test/run --part {' --part '.join(options.part)}", "",
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}), shared with other work; "
        f"{run('podman', '--version').strip()}, Compose {compose_version()}.", "",
    ]  # fmt: skip
    if report.stand_ins or options.stood_in:
        lines += ["No registry could be reached. In place of images from there:", ""]
        lines += [f"- `{name}`: {what}" for name, what in report.stand_ins.items()]
        lines += [f"- {what}" for what in options.stood_in]
        lines += ["- `grafana/grafana`: nothing; it is not in Debian, so it was left out and is untested", ""]
    lines += [
        "| image | MB, unpacked |",
        "|---|---|",
        *(f"| `{name}` | {size:.0f} |" for name, size in report.images),
        "",
    ]
    for part, facts in report.facts.items():
        lines += [f"## {part.capitalize()}", "", *(f"- {fact}" for fact in facts), ""]
    if report.kills:
        lines += ["kill -9 of each container's first process, from the host, while it trains. Podman's restart policy brought it back;",
                  "recovered: it runs again, and five more steps were done.", "",
                  "| killed | at step | recovered after, s |", "|---|---|---|"]  # fmt: skip
        lines += [f"| {name} | {step} | {seconds:.0f} |" for name, seconds, step in report.kills] + [""]
    lines += [
        "## Verdict",
        "",
        *([f"- failed: {each}" for each in report.failures] or ["Everything that was tried held."]),
        "",
    ]
    RESULTS.write_text("\n".join(lines))


def compose_version() -> str:
    words = os.environ.get("COMPOSE", "docker compose").split()
    return run(*words, "version", "--short").strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="deploy/test/run", description=__doc__)
    parser.add_argument("--part", action="append", choices=["build", "demo", "kills"], help="default: all three")
    parser.add_argument(
        "--image", action="append", choices=sorted(IMAGES), help="what is built; default: all but vLLM's"
    )
    parser.add_argument("--python-image", default=PYTHON, help="what ours are built on")
    parser.add_argument("--stand-ins", action="store_true", help="make the bases of Debian packages (mmdebstrap) first")
    parser.add_argument(
        "--stood-in", action="append", default=[], help="a line for the report, when they were made before"
    )
    parser.add_argument("--volume", action="append", default=[], help="mounted while building, for pip's configuration")
    parser.add_argument("--build-arg", action="append", default=[])
    parser.add_argument("--keep", action="store_true", help="leave containers and volumes as they are")
    options = parser.parse_args()
    options.part = options.part or ["build", "demo", "kills"]
    report = Report()
    try:
        run_parts(report, options)
    except Failed as error:
        report.failures.append(str(error))
    with contextlib.suppress(Failed):
        write(report, options)
    print("\n".join(report.failures) or "everything held", file=sys.stderr)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
