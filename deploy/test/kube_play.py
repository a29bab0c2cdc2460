#!/usr/bin/env python3
"""Has podman play what kubectl renders of the overlay `demo`: as it is, to hear what is ignored, then as plain pods.

    deploy/test/kube_play.py --control-plane localhost/sapo/control-plane:dev --learner localhost/sapo/learner:dev

Needs root, kubectl, podman (tried with 4.3), what deploy/kubernetes/secret/make.sh makes, and the images. What podman
does not do for itself is done here, and named: see STAND_INS. Prints the ledger of the run; ends with its exit code.
"""

import argparse
import base64
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

OVERLAY = Path(__file__).parent.parent / "kubernetes" / "overlays" / "demo"
NETWORK, PREFIX, OWNER = "sapo-kube-play", "sapo-kube-play-", "10001:10001"
STAND_INS = """\
- Deployment, StatefulSet and Job: one pod of each, called as its service, which gives it its name in the DNS
- PersistentVolumeClaim with fsGroup: a volume made before, of user 10001
- emptyDir: volumes with names of their own; podman shares those of the same name among pods
- Secret: in variables, stored as the JSON that podman 4.3 reads it as; as a volume, a ConfigMap
- $(VARIABLE) in commands and values: written out
- containerPort: left out; podman publishes it on the host
- probes: podman runs the liveness probe alone, and where there is no systemd not even that
"""


def podman(*words: str, check: bool = True) -> str:
    done = subprocess.run(["podman", *words], capture_output=True, text=True, timeout=600)
    if check and done.returncode:
        sys.exit(f"podman {' '.join(words[:3])}: {done.stderr.strip()[-600:]}")
    return done.stdout + done.stderr


def rendered(arguments: argparse.Namespace) -> str:
    """The overlay with the images and the number of steps that were asked for."""
    command = ["kubectl", "kustomize", str(OVERLAY)]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    for name in ("control_plane", "learner", "redis"):
        image = {"redis": "valkey/valkey"}.get(name, f"sapo/{name.replace('_', '-')}")
        text = re.sub(rf"image: {image}:\S+", f"image: {getattr(arguments, name)}", text)
    return re.sub(r"steps: \d+", f"steps: {arguments.steps}", text)


def ignored(text: str, directory: Path) -> Counter[str]:
    """Kinds that podman says it does not support; nothing of what it made stays."""
    (path := directory / "as-it-is.yaml").write_text(text)
    documents = list(yaml.safe_load_all(text))
    forget(documents)  # podman refuses claims whose volumes are there
    said = podman("--log-level=info", "kube", "play", "--start=false", "--network", NETWORK, str(path), check=False)
    names = [each["metadata"]["name"] for each in documents if each["kind"] == "Deployment"]
    podman("pod", "rm", "--force", "--ignore", *(f"{name}-pod-{number}" for name in names for number in (0, 1)))
    forget(documents)
    return Counter(re.findall(r"Kube kind (\w+) not supported", said))


def forget(documents: list[dict[str, Any]]) -> None:
    """Volumes and secrets that podman has made of them."""
    made = [each["metadata"]["name"] for each in documents if each["kind"] in ("PersistentVolumeClaim", "ConfigMap")]
    podman("volume", "rm", "--force", *made, "scratch", "shared-memory", check=False)
    podman("secret", "rm", *(each["metadata"]["name"] for each in documents if each["kind"] == "Secret"), check=False)


def as_pods(documents: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Documents that podman plays, and volumes that must be there before."""
    pods, volumes = [each for each in documents if each["kind"] == "ConfigMap"], []
    for name, values in _secrets(documents).items():
        pods.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": values})
    for each in documents:
        if each["kind"] in ("Deployment", "StatefulSet", "Job"):
            pod, own = _pod(each, _secrets(documents)["sapo"])
            pods.append(pod)
            volumes += own
    return pods, volumes


def _secrets(documents: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    found = {each["metadata"]["name"]: each["data"] for each in documents if each["kind"] == "Secret"}
    return {
        name: {key: base64.b64decode(value).decode() for key, value in data.items()} for name, data in found.items()
    }


def _pod(workload: dict[str, Any], secret: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    name, template = workload["metadata"]["name"], workload["spec"]["template"]
    spec = json.loads(re.sub(r"\$\((\w+)\)", lambda match: secret.get(match[1], name), json.dumps(template["spec"])))
    claimed = [each["metadata"]["name"] for each in workload["spec"].get("volumeClaimTemplates", [])]
    spec["volumes"] += [{"name": each, "persistentVolumeClaim": {"claimName": name}} for each in claimed]
    for container in spec["containers"]:
        container.pop("ports")
        for mount in container["volumeMounts"]:
            mount["name"] = f"{PREFIX}{name}-{mount['name']}"
    volumes = []
    for volume in spec["volumes"]:
        volume["name"] = f"{PREFIX}{name}-{volume['name']}"
        if "secret" in volume:
            secret = volume.pop("secret")
            volume["configMap"] = {"name": secret.pop("secretName"), **secret}
        if "persistentVolumeClaim" in volume:
            volumes.append(f"{PREFIX}{name}")
            volume["persistentVolumeClaim"]["claimName"] = volumes[-1]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}, volumes


def play(text: str, directory: Path, seconds: float) -> int:
    """Until the learner has ended; returns the exit code of `sapo ledger`, or the learner's."""
    documents = list(yaml.safe_load_all(text))
    (pods, volumes), path, secret = as_pods(documents), directory / "pods.yaml", directory / "secret.json"
    path.write_text(yaml.safe_dump_all(pods, sort_keys=False))
    by_kind = {(each["kind"], each["metadata"]["name"]): each for each in documents}
    secret.write_text(json.dumps(by_kind["Secret", "sapo"]["data"]))
    images = {each["spec"]["containers"][0]["image"] for each in pods if each["kind"] == "Pod"}
    try:
        podman("secret", "create", "sapo", str(secret))
        for volume in volumes:  # mounted once first: podman gives an empty one the owner of the image's directory
            podman("volume", "create", volume)
            podman("run", "--rm", "--user", "0", "--entrypoint", "sh", "--volume", f"{volume}:/data", min(images), "-c",
                   f"touch /data/.there && chown -R {OWNER} /data")  # fmt: skip
        podman("kube", "play", "--network", NETWORK, str(path))
        deadline = time.monotonic() + seconds
        state = ["podman", "inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "learner-learner"]
        while (now := subprocess.run(state, capture_output=True, text=True).stdout.split()) and now[0] != "exited":
            if time.monotonic() > deadline:
                print(podman("logs", "--tail", "5", "learner-learner"))
                sys.exit(f"the learner has not ended within {seconds:.0f} s")
            time.sleep(2)
        print(f"the learner ended with {now[1]}")
        ask = ["podman", "exec", "control-plane-control-plane", "sapo", "ledger", "http://127.0.0.1:8080"]
        return int(now[1]) or subprocess.run(ask, timeout=60).returncode
    finally:
        podman("kube", "down", str(path), check=False)
        made = re.findall(rf"^{PREFIX}\S+", podman("volume", "ls", "--quiet"), re.MULTILINE)
        podman("volume", "rm", "--force", *made, check=False)
        forget([*documents, *pods])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--control-plane", required=True, metavar="IMAGE")
    parser.add_argument("--learner", required=True, metavar="IMAGE")
    parser.add_argument("--redis", default="docker.io/valkey/valkey:8.1", metavar="IMAGE")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=900, help="how long the run may take")
    arguments = parser.parse_args()
    text = rendered(arguments)
    podman("network", "create", NETWORK, check=False)
    with tempfile.TemporaryDirectory() as scratch:
        for kind, count in ignored(text, Path(scratch)).most_common():
            print(f"- ignored: {count} {kind}")
        print(STAND_INS, end="")
        code = play(text, Path(scratch), arguments.seconds)
    podman("network", "rm", "--force", NETWORK, check=False)
    return code


if __name__ == "__main__":
    sys.exit(main())
