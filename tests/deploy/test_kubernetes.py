"""deploy/kubernetes without a cluster: what kubectl renders is valid, restricted, and opens only the needed ways."""

import base64
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import pytest
import yaml
from kubernetes_validate import utils as kubernetes_schemas

from services.runtime.auth import Tokens
from services.runtime.roles import Role
from services.runtime.settings import Environment
from tests import kubernetes
from tests.documents import ROOT
from tests.kubernetes import KUBERNETES, OVERLAYS, Manifests, copied, unexplained_variables

NEWEST = sorted({kubernetes_schemas.major_minor(each) for each in kubernetes_schemas.all_versions()},
                key=lambda each: tuple(map(int, each.split("."))))[-3:]  # fmt: skip
CUSTOM = {"ScaledObject", "PodMonitor"}
READ_BY_OTHERS = {"HOME", "PYTHONUNBUFFERED", "HF_HOME", "HF_TOKEN", "REDISCLI_AUTH"}
"""By Python, huggingface_hub and valkey-cli."""
PAIRS = {
    *((each, "control-plane", 8080) for each in ("ingest", "learner", "rollout", "prometheus")),
    *(("prometheus", each, 9100) for each in ("ingest", "learner", "rollout")),
    *((each, "redis", 6379) for each in ("control-plane", "ingest", "learner")),
    ("rollout", "ingest", 8081),
}


# ---- Schemas


@pytest.mark.parametrize("minor", NEWEST)
def test_every_object_is_what_the_newest_versions_of_kubernetes_take(minor: str, manifests: Manifests) -> None:
    for each in manifests.objects:
        if each["kind"] not in CUSTOM:
            kubernetes_schemas.validate(each, minor, strict=True)


def test_a_misspelt_field_is_refused(texts: dict[str, str]) -> None:
    wrong = Manifests(texts["demo"].replace("readinessProbe", "readynessProbe"))
    with pytest.raises(kubernetes_schemas.ValidationError, match="readynessProbe"):
        kubernetes_schemas.validate(wrong.get("Deployment", "ingest"), NEWEST[-1], strict=True)


def test_kinds_of_operators_have_only_fields_that_these_know(manifests: Manifests) -> None:
    schema = yaml.safe_load((Path(__file__).parent / "custom_resources.yaml").read_text())
    for each in manifests.of(*CUSTOM):
        jsonschema.validate(each, schema)
        misspelt = json.loads(json.dumps(each).replace("interval", "intervall").replace("threshold", "treshold"))
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(misspelt, schema)


# ---- Rules, each with what it finds in a copy that breaks it

KNOWN = {f"SAPO_{name.upper()}" for name in Environment.model_fields} | {"SAPO_CACHE_DIR"} | READ_BY_OTHERS
Rule = Callable[[Manifests], Iterator[str]]


def unexplained(manifests: Manifests) -> Iterator[str]:
    return unexplained_variables(manifests, KNOWN)


LEARNER_BUDGET = "minAvailable: 1\n  selector:\n    matchLabels:\n      app.kubernetes.io/component: learner"
BROKEN: list[tuple[Rule, str, str, int]] = [  # rule, what is replaced, by what, how many findings
    (kubernetes.loose_containers, "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", 5),
    (kubernetes.loose_containers, "runAsUser: 10001", "runAsUser: 0", 5),
    (kubernetes.loose_containers, "automountServiceAccountToken: false", "hostPID: false", 5),
    (kubernetes.unbounded_containers, "limits:", "claims:", 5),
    (kubernetes.unbounded_containers, "GracePeriodSeconds: 75", "GracePeriodSeconds: 30", 4),
    (kubernetes.unbounded_containers, "sizeLimit: 64Mi", "medium: Memory", 1),
    (kubernetes.missing_probes, "startupProbe", "startProbe", 5),
    (kubernetes.missing_probes, "grpc:\n            port: 8081", "grpc:\n            port: 8082", 1),
    (kubernetes.missing_probes, "port: http\n          periodSeconds: 10", "port: web\n          periodSeconds: 10", 5),
    (kubernetes.dangling_selectors, LEARNER_BUDGET, LEARNER_BUDGET.replace("learner", "teacher"), 1),
    (kubernetes.dangling_selectors, "containerPort: 9100", "containerPort: 9101", 3),
    (kubernetes.unnamed_references, "claimName: learner", "claimName: runs", 1),
    (unexplained, "SAPO_INGEST_ADDRESS", "SAPO_INGEST_ADRESS", 4),
]


@pytest.mark.parametrize("rule", sorted({each[0] for each in BROKEN}, key=lambda each: each.__name__),
                         ids=lambda each: each.__name__)  # fmt: skip
def test_no_rule_is_broken(rule: Rule, manifests: Manifests) -> None:
    assert list(rule(manifests)) == []


@pytest.mark.parametrize(
    ("rule", "right", "wrong", "findings"), BROKEN, ids=lambda each: getattr(each, "__name__", str(each)[:40])
)
def test_a_broken_rule_is_found(rule: Rule, right: str, wrong: str, findings: int, texts: dict[str, str]) -> None:
    assert right in texts["demo"]
    assert len(list(rule(Manifests(texts["demo"].replace(right, wrong))))) == findings


# ---- Who speaks with whom


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_needed_pairs_may_speak(overlay: str, texts: dict[str, str]) -> None:
    found = kubernetes.allowed(Manifests(texts[overlay]))
    among_ranks = {each for each in found if each[:2] == ("learner", "learner")}
    assert found - among_ranks == PAIRS
    assert bool(among_ranks) == (overlay == "multi-node")
    assert all(("learner", "learner", port) in among_ranks for port in (-1, 29500)) == (overlay == "multi-node")


def test_what_no_policy_names_is_denied(manifests: Manifests) -> None:
    denied = manifests.get("NetworkPolicy", "default-deny")["spec"]
    assert denied == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_a_policy_that_lets_in_more_is_found_once_both_sides_have_it(texts: dict[str, str]) -> None:
    leaves = texts["demo"].replace("port: 8081\n    to:", "port: 8081\n    - port: 9100\n    to:")
    assert leaves != texts["demo"]
    assert kubernetes.allowed(Manifests(leaves)) == PAIRS, "the other side lets nobody in"
    enters = leaves.replace("    ports:\n    - port: 8081", "    ports:\n    - port: 8081\n    - port: 9100")
    assert kubernetes.allowed(Manifests(enters)) - PAIRS == {("rollout", "ingest", 9100)}


def test_workers_have_no_password_of_redis_and_everybody_else_an_address(manifests: Manifests) -> None:
    for each in manifests.workloads:
        names = manifests.variables(each)
        if each.component in ("control-plane", "ingest", "learner"):
            assert {"SAPO_REDIS_URL", "SAPO_CONTROL_PLANE_URL"} <= names
        if each.component == "rollout":
            assert {"SAPO_INGEST_ADDRESS", "SAPO_CONTROL_PLANE_URL"} <= names
            assert not {"SAPO_REDIS_URL", "REDIS_PASSWORD"} & names


# ---- Secrets


def secrets_of(manifests: Manifests, component: str) -> dict[str, str]:
    """What a pod's container may read of the secrets, by the name of the variable that says it, or where it is."""
    pod = next(each for each in manifests.workloads if each.component == component)
    found = {}
    for name, each in pod.environment.items():
        if asked := each.get("valueFrom", {}).get("secretKeyRef"):
            found[name] = _secret(manifests, asked["name"]).get(asked["key"], "")
    for volume in pod.pod["volumes"]:
        if "secret" in volume:
            (mount,) = [each for each in pod.container["volumeMounts"] if each["name"] == volume["name"]]
            values, chosen = _secret(manifests, volume["secret"]["secretName"]), volume["secret"].get("items")
            for name, value in ({each["path"]: values[each["key"]] for each in chosen} if chosen else values).items():
                path = f"{mount['mountPath']}/{name}"
                (variable,) = [key for key, each in pod.environment.items() if each.get("value") == path]
                found[variable] = value
    return found


def _secret(manifests: Manifests, name: str) -> dict[str, str]:
    return {key: base64.b64decode(value).decode() for key, value in manifests.get("Secret", name)["data"].items()}


def test_every_pod_has_the_token_of_its_role_and_nothing_more(manifests: Manifests, tmp_path: Path) -> None:
    given = {each.component: secrets_of(manifests, each.component) for each in manifests.workloads}
    (path := tmp_path / "tokens").write_text(given["control-plane"]["SAPO_TOKENS_FILE"])
    tokens = Tokens.in_file(str(path))

    def role(component: str, variable: str) -> Role | None:
        return tokens.role(f"Bearer {given[component][variable]}".encode())

    assert given["rollout"].keys() - {"HF_TOKEN"} == {"SAPO_TOKEN_FILE"}
    assert role("rollout", "SAPO_TOKEN_FILE") is role("ingest", "SAPO_TOKEN_FILE") is Role.WORKER
    assert role("learner", "SAPO_TOKEN_FILE") is Role.LEARNER
    assert role("control-plane", "SAPO_TOKEN_FILE") is Role.ADMIN
    assert given["ingest"]["SAPO_TOKENS_FILE"] == given["control-plane"]["SAPO_TOKENS_FILE"]
    assert "SAPO_TOKENS_FILE" not in given["learner"]


def test_secrets_are_made_once_each_another_and_readable_by_nobody_else(kubernetes_tree: Path) -> None:
    made = kubernetes_tree / "secret" / "made"
    before = {path.name: path.read_text() for path in made.iterdir()}
    single = [before[name] for name in ("admin", "learner", "worker", "viewer", "redis_password")]
    assert len(set(single)) == 5
    assert all(re.fullmatch("[A-Za-z0-9]{40}", each) for each in single)
    assert {path.stat().st_mode & 0o077 for path in made.iterdir()} == {0}
    subprocess.run([made.parent / "make.sh"], check=True, timeout=20)
    assert {path.name: path.read_text() for path in made.iterdir()} == before


def test_what_is_given_later_is_added_and_what_contradicts_is_said(tmp_path: Path) -> None:
    copy = copied(tmp_path / "kubernetes") / "secret"

    def make(**given: str) -> "subprocess.CompletedProcess[str]":
        environment = {"PATH": os.environ["PATH"], **given}
        return subprocess.run([copy / "make.sh"], env=environment, capture_output=True, text=True, timeout=20)

    for _ in range(2):
        assert make(HF_TOKEN="hub", SAPO_REDIS_URL="rediss://:a@host/0").returncode == 0
    lines = (copy / "made" / "secret.env").read_text().splitlines()
    assert lines[1:] == ["SAPO_REDIS_URL=rediss://:a@host/0", "HF_TOKEN=hub"]
    refused = make(HF_TOKEN="another")
    assert (refused.returncode, refused.stderr) == (1, "made/secret.env has another HF_TOKEN already: edit it there\n")


def test_a_variable_is_defined_before_the_one_that_is_made_of_it(manifests: Manifests) -> None:
    for each in manifests.workloads:
        names = list(each.environment)
        if "redis://" in str(value := each.environment.get("SAPO_REDIS_URL", {}).get("value")):
            assert "$(REDIS_PASSWORD)" in value
            assert names.index("REDIS_PASSWORD") < names.index("SAPO_REDIS_URL")


def test_secret_values_are_in_the_secrets_alone(manifests: Manifests) -> None:
    others = json.dumps([each for each in manifests.objects if each["kind"] != "Secret"])
    for each in manifests.of("Secret"):
        for value in _secret(manifests, each["metadata"]["name"]).values():
            assert not [line for line in value.splitlines() if line.rpartition(": ")[2] in others]


def test_no_secret_is_committed() -> None:
    made = KUBERNETES / "secret" / "made"
    ignored = subprocess.run(["git", "check-ignore", "-q", made / "secret.env"], cwd=ROOT)
    assert ignored.returncode in (0, 128), "git would take it"  # 128: no checkout


def test_every_file_is_part_of_an_overlay(kubernetes_tree: Path) -> None:
    """None is left over."""
    named = {path for file in kubernetes_tree.rglob("kustomization.yaml") for path in _named(file)}
    files = {path for path in kubernetes_tree.rglob("*.yaml") if path.name != "kustomization.yaml"}
    assert {path.relative_to(kubernetes_tree) for path in files - named} == set()


def _named(file: Path) -> Iterator[Path]:
    words = shlex.split(re.sub(r"[\[\]{},|]", " ", file.read_text()), comments=True)
    yield from ((file.parent / word).resolve() for word in words if word.endswith(".yaml"))
