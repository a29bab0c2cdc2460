"""`deploy/test/run`: images built, the demo run by Compose to its end, every container killed in turn, a few steps with
vLLM's image, the rendered manifests of Kubernetes played by podman; the report."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from bases import PYTHON, make_stand_ins
from containers import ROOT, Failed, Stack, build, eventually, podman, run
from report import Report

PASS_AT_1 = 0.90
PARTS = ["build", "demo", "kills", "vllm", "kubernetes"]
VLLM_STEPS = 6
IMAGES = {
    "control-plane": ("control-plane.Dockerfile", []),
    "learner": ("learner.Dockerfile", []),
    "rollout-vllm": ("rollout-vllm.Dockerfile", ["LOCK=rollout-vllm-cpu"]),
}
DEMO_SECONDS, RECOVERY_SECONDS = 3600, 600


def build_images(report: Report, options: argparse.Namespace) -> None:
    for name in options.image or IMAGES:
        dockerfile, arguments = IMAGES[name]
        revision = run("git", "rev-parse", "HEAD").strip()
        given = [f"PYTHON_IMAGE={options.python_image}", f"REVISION={revision}", *arguments, *options.build_arg]
        started = time.monotonic()
        build(f"sapo/{name}:dev", ROOT / "deploy" / "docker" / dockerfile, options.volume, *given)
        print(f"built sapo/{name} in {time.monotonic() - started:.0f} s", flush=True)


def measure_images(report: Report, python_image: str) -> None:
    listed = json.loads(run("podman", "images", "--format", "json"))
    sizes = {name: each["Size"] / 1e6 for each in listed for name in each.get("Names") or []}
    wanted = {f"localhost/sapo/{name}:dev": " ".join([f"sapo/{name}", *given]) for name, (_, given) in IMAGES.items()}
    wanted[python_image] = f"{python_image} (base)"
    report.images = [(shown, sizes[name]) for name, shown in wanted.items() if name in sizes]


def demo(stack: Stack, report: Report) -> None:
    """The demo of README, to its end."""
    report.part = "Demo"
    started = time.monotonic()
    eventually("the demo ends", DEMO_SECONDS, lambda: stack.status()["state"] == "finished")
    seconds, last = time.monotonic() - started, stack.status()["evaluations"][-1]
    report.check(True, f"finished {seconds:.0f} s after the containers were up")
    good = last["pass_at_1"] >= PASS_AT_1
    report.check(good, f"final pass@1 {last['pass_at_1']:.3f} at step {last['step']} (bar {PASS_AT_1})")
    ledger = stack.sapo("ledger", "/runs/demo")
    report.check(ledger["balanced"], f"ledger balanced, draw by draw: {counts(ledger)}")
    (learner,) = stack.containers("learner").values()
    eventually("the learner ends", 120, lambda: not stack.containers("learner")[learner["Name"]]["State"]["Running"])
    (learner,) = stack.containers("learner").values()
    report.check(learner["State"]["ExitCode"] == 0, f"the learner ended with {learner['State']['ExitCode']}")
    others = [each for each in stack.containers().values() if each["Name"].split("-")[1] not in ("learner", "secrets")]
    undisturbed = all(each["State"]["Running"] and not each["RestartCount"] for each in others)
    report.check(undisturbed, f"the {len(others)} others run, none was restarted")
    full = [name for name, each in stack.containers().items() if each["State"]["OOMKilled"]]
    report.check(not full, "no memory limit was reached")


def counts(ledger: dict[str, Any]) -> str:
    return ", ".join(f"{ledger[kind]} {kind}" for kind in ("accepted", "trained", "degenerate", "backlog"))


def targets() -> list[str]:
    """Processes that Prometheus reaches, by job."""
    with urllib.request.urlopen("http://127.0.0.1:9090/api/v1/targets?state=active", timeout=10) as answer:
        active = json.load(answer)["data"]["activeTargets"]
    return sorted(each["labels"]["job"] for each in active if each["health"] == "up")


def is_locked_down(stack: Stack, report: Report) -> None:
    for name, each in stack.containers().items():
        if "-secrets-" in name:
            continue
        host, user = each["HostConfig"], each["Config"]["User"]
        if not (host["ReadonlyRootfs"] and not each["EffectiveCaps"] and user not in ("", "root", "0")):
            seen = f"read-only {host['ReadonlyRootfs']}, {each['EffectiveCaps']}, user {user!r}"
            report.check(False, f"{name}: {seen}")
            return
    report.check(True, "every container: read-only root, no capability, a user that is not root")


def kills(stack: Stack, report: Report) -> None:
    """kill -9 of each container's first process, from outside; podman's restart policy alone brings it back."""
    report.part = "Kills"
    eventually("training begins", DEMO_SECONDS, lambda: steps(stack) >= 3)
    is_locked_down(stack, report)
    eventually("Prometheus reaches five processes", 120, lambda: len(targets()) == 5)
    report.check(True, f"Prometheus scrapes {', '.join(targets())}")
    for name in [name for name, each in stack.containers().items() if each["State"]["Running"]]:
        before, restarts = steps(stack), stack.containers()[name]["RestartCount"]
        os.kill(stack.containers()[name]["State"]["Pid"], signal.SIGKILL)

        def recovered(name: str = name, before: int = before, restarts: int = restarts) -> bool:
            each = stack.containers()[name]
            return each["State"]["Running"] and each["RestartCount"] > restarts and steps(stack) >= before + 5

        try:
            report.kills.append((name, eventually(f"{name} recovers", RECOVERY_SECONDS, recovered), before))
        except Failed as error:
            report.check(False, str(error))
            return
        print(f"killed {name} at step {before}: recovered in {report.kills[-1][1]:.0f} s", flush=True)
    drain(stack, report)


def steps(stack: Stack) -> int:
    return int(stack.status()["learner"]["step"])


def zombies(stack: Stack) -> list[str]:
    """Processes that nobody has reaped, by container: none where the first process is an init."""
    states = {
        name: run("podman", "top", name, "state").split()[1:] for name in stack.containers() if "-secrets-" not in name
    }
    return [name for name, each in states.items() if "Z" in each]


def is_healthy(container: dict[str, Any]) -> bool:
    """Or is the one that has done its work and ended. One that is still loading modules would end undrained."""
    return "-secrets-" in container["Name"] or container["State"]["Health"]["Status"] == "healthy"


def drain(stack: Stack, report: Report) -> None:
    """SIGTERM: workers and learner finish what they do, save, and end with 0."""
    eventually(
        "every container is healthy", RECOVERY_SECONDS, lambda: all(map(is_healthy, stack.containers().values()))
    )
    report.check(not zombies(stack), f"no zombies in {zombies(stack) or 'any container'}")
    step = steps(stack)
    stack.compose("stop", "rollout", "learner")
    ended = {**stack.containers("rollout"), **stack.containers("learner")}
    codes = {name: each["State"]["ExitCode"] for name, each in ended.items()}
    report.check(not any(codes.values()), f"docker compose stop at step {step}: exit codes {sorted(codes.values())}")
    ledger = stack.sapo("ledger", "/runs/kills")
    report.check(ledger["balanced"], f"ledger balanced, draw by draw, after all kills: {counts(ledger)}")


def vllm(stack: Stack, report: Report) -> None:
    """A worker from vLLM's image, here for CPUs, samples a short run by itself."""
    report.part = "vLLM"
    eventually("the run ends", DEMO_SECONDS, lambda: stack.status()["state"] == "finished")
    (worker,) = stack.containers("rollout-vllm").values()
    (heard,) = stack.status()["workers"]
    report.check(heard["version"] > 0, f"it alone sampled {VLLM_STEPS} steps; it serves version {heard['version']} now")
    report.check(not worker["RestartCount"], "it was not restarted")
    report.check(worker["HostConfig"]["ReadonlyRootfs"], "on a read-only root, as a user that is not root")
    ledger = stack.sapo("ledger", "/runs/vllm")
    report.check(ledger["balanced"], f"ledger balanced, draw by draw: {counts(ledger)}")
    stack.compose("stop", "rollout-vllm")
    (worker,) = stack.containers("rollout-vllm").values()
    report.check(worker["State"]["ExitCode"] == 0, f"docker compose stop: exit code {worker['State']['ExitCode']}")


def kubernetes(report: Report, redis: str) -> None:
    """The overlay `demo` as far as podman plays it, and what it does not."""
    report.part = "Kubernetes"
    secret = ROOT / "deploy" / "kubernetes" / "secret"
    made = not (secret / "made").exists()
    subprocess.run([secret / "make.sh"], check=True, timeout=20)
    images = ["--control-plane", "localhost/sapo/control-plane:dev", "--learner", "localhost/sapo/learner:dev"]
    command = [sys.executable, str(Path(__file__).parent / "kube_play.py"), *images, "--redis", redis]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEMO_SECONDS)
    finally:
        if made:
            shutil.rmtree(secret / "made")
    for line in done.stdout.splitlines():
        if line.startswith("- "):
            report.note(line.removeprefix("- "))
    why = "" if done.returncode == 0 else f": {(done.stderr or done.stdout).strip()[-300:]}"
    report.check(not why, f"the run ends, its learner with 0, its ledger balanced{why}")


def run_parts(report: Report, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory, podman():
        if options.stand_ins:
            report.stand_ins += make_stand_ins()
        if "build" in options.part:
            build_images(report, options)
        measure_images(report, options.python_image)
        if "kubernetes" in options.part:
            kubernetes(report, options.redis_image)
        text = (ROOT / "deploy/examples/demo.yaml").read_text()
        if "vllm" in options.part:
            short = Path(directory) / "vllm.yaml"
            short.write_text(
                text.replace("name: demo", "name: vllm").replace("steps: 150", f"steps: {VLLM_STEPS}")
                + "engine: {name: vllm}\n"
            )
            with Stack("sapo", "vllm-cpu.yml", keep=options.keep) as stack:
                stack.up("learner", "rollout-vllm", SAPO_RUN=str(short))
                vllm(stack, report)
        if not {"demo", "kills"} & set(options.part):
            return
        # Endless: it is stopped, not awaited.
        endless = Path(directory) / "kills.yaml"
        endless.write_text(text.replace("name: demo", "name: kills").replace("steps: 150", "steps: 100000"))
        with Stack("sapo", keep=options.keep) as stack:
            if "demo" in options.part:
                stack.up()
                demo(stack, report)
            if "kills" in options.part:
                stack.up(SAPO_RUN=str(endless))
                kills(stack, report)


def main() -> int:
    parser = argparse.ArgumentParser(prog="deploy/test/run", description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all of them")
    parser.add_argument("--image", action="append", choices=sorted(IMAGES), help="what is built; default: all of them")
    parser.add_argument("--python-image", default=PYTHON, help="what ours are built on")
    parser.add_argument("--redis-image", default="docker.io/valkey/valkey:8.1", help="that podman plays")
    parser.add_argument("--stand-ins", action="store_true", help="make the bases of Debian packages (mmdebstrap) first")
    parser.add_argument(
        "--stood-in", action="append", default=[], help="a line for the report, when they were made before"
    )
    parser.add_argument("--volume", action="append", default=[], help="mounted while building, for pip's configuration")
    parser.add_argument("--build-arg", action="append", default=[])
    parser.add_argument("--keep", action="store_true", help="leave containers and volumes as they are")
    options = parser.parse_args()
    options.part = options.part or PARTS
    report = Report(stand_ins=options.stood_in)
    try:
        run_parts(report, options)
    except Failed as error:
        report.check(False, str(error))
    report.write()
    print("\n".join(report.failures) or "everything held", file=sys.stderr)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
