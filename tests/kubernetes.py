"""What kubectl makes of deploy/kubernetes, and rules for it that need no cluster: each gives what breaks it."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.runtime.lifecycle import DRAIN_GRACE_SECONDS
from tests.documents import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("demo", "gpu", "multi-node")
COMPONENT = "app.kubernetes.io/component"
WORKLOADS = ("Deployment", "StatefulSet", "Job")
PROMETHEUS = "prometheus"

Object = dict[str, Any]


def kubectl() -> str:
    """Its path; where it is missing, the test is skipped, and fails in CI."""
    found = shutil.which("kubectl")
    if found is None:
        reason = "kubectl is not installed (1.21 or newer)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return found


def copied(directory: Path) -> Path:
    """deploy/kubernetes, with the secrets that a user makes."""
    copy = Path(shutil.copytree(KUBERNETES, directory, ignore=shutil.ignore_patterns("made")))
    subprocess.run([copy / "secret" / "make.sh"], env={"PATH": os.environ["PATH"]}, check=True, timeout=20)
    return copy


def rendered(overlay: Path) -> str:
    done = subprocess.run([kubectl(), "kustomize", str(overlay)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@dataclass(frozen=True)
class Workload:
    kind: str
    name: str
    component: str
    spec: Object

    @property
    def pod(self) -> Object:
        return dict(self.spec["template"]["spec"])

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.spec["template"]["metadata"]["labels"])

    @property
    def container(self) -> Object:
        (only,) = self.pod["containers"]
        return dict(only)

    @property
    def ports(self) -> dict[str, int]:
        return {each["name"]: each["containerPort"] for each in self.container["ports"]}

    @property
    def environment(self) -> dict[str, Object]:
        return {each["name"]: each for each in self.container.get("env", [])}


class Manifests:
    def __init__(self, text: str) -> None:
        self.objects: list[Object] = list(yaml.load_all(text, Loader=yaml.CSafeLoader))

    def of(self, *kinds: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] in kinds]

    def get(self, kind: str, name: str) -> Object:
        (found,) = [each for each in self.of(kind) if each["metadata"]["name"] == name]
        return found

    @property
    def workloads(self) -> list[Workload]:
        return [
            Workload(each["kind"], each["metadata"]["name"], each["spec"]["template"]["metadata"]["labels"][COMPONENT],
                     each["spec"])
            for each in self.of(*WORKLOADS)
        ]  # fmt: skip

    def workload(self, name: str) -> Workload:
        (found,) = [each for each in self.workloads if each.name == name]
        return found

    def variables(self, workload: Workload) -> set[str]:
        """Names of all environment variables of its container."""
        names = set(workload.environment)
        for source in workload.container.get("envFrom", []):
            names |= self.get("ConfigMap", source["configMapRef"]["name"])["data"].keys()
        return names


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Kubernetes' label selectors, as far as they are used here."""
    assert selector.keys() <= {"matchLabels", "matchExpressions"}, selector
    for each in selector.get("matchExpressions", []):
        assert each["operator"] == "In"
        if labels.get(each["key"]) not in each["values"]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


# ---- Rules


def loose_containers(manifests: Manifests) -> Iterator[str]:
    """Those outside Kubernetes' restricted Pod Security Standard, or that may write to their image."""
    for each in manifests.workloads:
        pod, container = each.pod["securityContext"], each.container["securityContext"]
        strict = (
            pod.get("runAsNonRoot"), pod.get("runAsUser"), pod.get("seccompProfile"),
            container.get("allowPrivilegeEscalation"), container.get("readOnlyRootFilesystem"),
            container.get("capabilities"), each.pod.get("automountServiceAccountToken"),
        )  # fmt: skip
        wanted = (True, 10001, {"type": "RuntimeDefault"}, False, True, {"drop": ["ALL"]}, False)
        if strict != wanted or container.get("privileged") or each.pod.get("hostNetwork"):
            yield f"{each.name}: not restricted"


def unbounded_containers(manifests: Manifests) -> Iterator[str]:
    for each in manifests.workloads:
        limits, requests = (each.container["resources"].get(kind, {}) for kind in ("limits", "requests"))
        if not limits.keys() & requests.keys() >= {"cpu", "memory"}:
            yield f"{each.name}: no limits"
        for volume in each.pod["volumes"]:
            if "sizeLimit" not in volume.get("emptyDir", {"sizeLimit": ""}):
                yield f"{each.name}: {volume['name']} may fill the node"
        if each.pod["terminationGracePeriodSeconds"] <= DRAIN_GRACE_SECONDS and each.component != "redis":
            yield f"{each.name}: killed before it has drained"


def missing_probes(manifests: Manifests) -> Iterator[str]:
    for each in manifests.workloads:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = each.container.get(probe, {})
            port = asked.get("httpGet", {}).get("port") or asked.get("grpc", {}).get("port")
            if port not in {*each.ports, *each.ports.values()} and "exec" not in asked:
                yield f"{each.name}: {probe}"


def dangling_selectors(manifests: Manifests) -> Iterator[str]:
    """Selectors that select no pod of ours; ports of services and monitors that no selected pod has."""
    for each in manifests.objects:
        selector = _pod_selector(each)
        if selector is None:
            continue
        chosen = [pod for pod in manifests.workloads if selects(selector, pod.labels)]
        name = f"{each['kind']} {each['metadata']['name']}"
        if not chosen:
            yield f"{name}: selects nothing"
        if each["kind"] == "Service":
            yield from (
                f"{name}: no port {port['targetPort']}" for port in each["spec"]["ports"]
                if any(port["port"] != pod.ports.get(port["targetPort"]) for pod in chosen)
            )  # fmt: skip
        if each["kind"] == "PodMonitor":
            (endpoint,) = each["spec"]["podMetricsEndpoints"]
            yield from (f"{name}: {pod.name} has no {endpoint['port']}" for pod in chosen
                        if endpoint["port"] not in pod.ports)  # fmt: skip


def _pod_selector(each: Object) -> Object | None:
    match each["kind"]:
        case "Service":
            return {"matchLabels": each["spec"]["selector"]}
        case "NetworkPolicy":
            return dict(each["spec"]["podSelector"])
        case "PodDisruptionBudget" | "PodMonitor" | "Deployment" | "StatefulSet":
            return dict(each["spec"]["selector"])
    return None


def unexplained_variables(manifests: Manifests, known: set[str]) -> Iterator[str]:
    """Environment variables that nobody reads: neither `known` nor the container's own command or variables."""
    for each in manifests.workloads:
        words = [*each.container["command"], *(str(one.get("value")) for one in each.environment.values())]
        own = set(re.findall(r"\$[({]?(\w+)", " ".join(words)))
        for name in sorted(manifests.variables(each) - known - own):
            yield f"{each.name}: {name}"


def unnamed_references(manifests: Manifests) -> Iterator[str]:
    """ConfigMaps, Secrets and claims that a pod refers to and that are not there."""
    there = {(each["kind"], each["metadata"]["name"]) for each in manifests.objects}
    kinds = {"configMapRef": "ConfigMap", "secretKeyRef": "Secret", "configMap": "ConfigMap",
             "persistentVolumeClaim": "PersistentVolumeClaim"}  # fmt: skip
    for each in manifests.workloads:
        for key, value in _mappings(each.pod):
            if key in kinds and (kinds[key], value.get("name") or value.get("claimName")) not in there:
                yield f"{each.name}: {key} {value}"


def _mappings(value: Any) -> Iterator[tuple[str, Object]]:
    if isinstance(value, dict):
        yield from ((key, each) for key, each in value.items() if isinstance(each, dict))
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _mappings(each)


# ---- Who may speak with whom


def allowed(manifests: Manifests) -> set[tuple[str, str, int]]:
    """(from, to, port) between our pods and from Prometheus, as the policies have it; port -1: all of them."""
    pods = {each.component: each.labels for each in manifests.workloads}
    return {
        (source, target.component, port)
        for source, target in product([*pods, PROMETHEUS], manifests.workloads)
        for port in (-1, *target.ports.values())
        if _lets(manifests, "Ingress", target.labels, pods.get(source, {}), port)
        and (source == PROMETHEUS or _lets(manifests, "Egress", pods[source], target.labels, port))
    }


def _lets(manifests: Manifests, direction: str, own: dict[str, str], peer: dict[str, str], port: int) -> bool:
    """Whether a policy of `own` names the peer ({}: a pod of the namespace `monitoring`) and the port."""
    policies = [each["spec"] for each in manifests.of("NetworkPolicy") if selects(each["spec"]["podSelector"], own)]
    if not any(direction in each["policyTypes"] for each in policies):
        return True
    rules = [rule for each in policies for rule in each.get(direction.lower(), ())]
    side = "from" if direction == "Ingress" else "to"
    return any(
        any(_is_peer(each, peer) for each in rule.get(side, ()))
        and ("ports" not in rule or port in {each["port"] for each in rule["ports"]})
        for rule in rules
    )


def _is_peer(rule: Object, peer: dict[str, str]) -> bool:
    if not peer:
        return selects(rule.get("namespaceSelector", {"matchLabels": {"": "x"}}),
                       {"kubernetes.io/metadata.name": "monitoring"})  # fmt: skip
    return rule.keys() == {"podSelector"} and selects(rule["podSelector"], peer)
