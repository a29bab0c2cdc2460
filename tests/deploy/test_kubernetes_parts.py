"""deploy/kubernetes without a cluster: commands, run.yaml, metrics and Redis are what services and tools expect."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

from sapo_learner.config import parse
from services.cli import app
from services.runstore import RunStore
from services.runstore.embedded import EmbeddedRedis
from services.runtime.metric_definitions import METRICS
from services.runtime.settings import RunConfig, load_config
from tests.documents import ROOT
from tests.kubernetes import KUBERNETES, OVERLAYS, Manifests, copied, rendered
from tests.prometheus import RULES, Expression, promtool
from tests.small_run import free_address

# ---- Commands


def parsed_by_sapo(words: list[str]) -> Any:
    """The click context of what follows `sapo`; fails for what the command line refuses."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    with command.make_context("sapo", words, resilient_parsing=False) as context:
        return context


def learner_words(manifests: Manifests, index: int, directory: Path) -> list[str]:
    """What the learner's container gives torchrun, in the pod of that index."""
    command, environment = manifests.workload("learner").container["command"], {}
    if command[0] == "torchrun":
        return list(command[1:])
    (fake := directory / "torchrun").write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n')
    fake.chmod(0o755)
    nodes = manifests.workload("learner").environment["NODES"]["value"]
    environment = {"PATH": f"{directory}:/usr/bin:/bin", "NODES": nodes, "JOB_COMPLETION_INDEX": str(index)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.splitlines()


def test_containers_run_commands_that_exist_and_listen_where_others_look(manifests: Manifests, tmp_path: Path) -> None:
    listens = {}
    for each in manifests.workloads:
        tool, *words = each.container["command"]
        if each.component == "learner":
            words = get_args_parser().parse_args(learner_words(manifests, 0, tmp_path)).training_script_args
        elif each.component == "redis":
            continue
        else:
            assert tool == "sapo"
        parameters = parsed_by_sapo(words).params
        listens[each.component] = {name: value for name, value in parameters.items() if "listen" in name and value}
    assert listens == {
        "control-plane": {"listen": "0.0.0.0:8080"},
        "ingest": {"listen": "0.0.0.0:8081", "http_listen": "0.0.0.0:9100"},
        "learner": {"http_listen": "0.0.0.0:9100"},
        "rollout": {"http_listen": "0.0.0.0:9100"},
    }


def test_the_first_pod_of_several_nodes_holds_the_rendezvous_of_all(texts: dict[str, str], tmp_path: Path) -> None:
    manifests = Manifests(texts["multi-node"])
    job, first, second = manifests.workload("learner"), *(
        get_args_parser().parse_args(learner_words(manifests, index, tmp_path)) for index in (0, 1)
    )  # fmt: skip
    nodes = int(first.nnodes)
    assert (job.spec["completionMode"], job.spec["completions"], job.spec["parallelism"]) == ("Indexed", nodes, nodes)
    assert manifests.get("PodDisruptionBudget", "learner")["spec"]["minAvailable"] == nodes
    assert manifests.get("PersistentVolumeClaim", "learner")["spec"]["accessModes"] == ["ReadWriteMany"]
    assert (first.rdzv_conf, second.rdzv_conf) == ("is_host=1", "is_host=0")
    assert first.rdzv_endpoint == second.rdzv_endpoint == f"{first.local_addr}:{job.ports['rendezvous']}"
    service = manifests.get("Service", job.pod["subdomain"])["spec"]
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    assert first.local_addr == f"{job.name}-0.{job.pod['subdomain']}"
    assert second.local_addr == f"{job.name}-1.{job.pod['subdomain']}"


def test_a_job_refers_to_nothing_whose_name_changes(manifests: Manifests) -> None:
    """Its template is immutable: `kubectl apply` of another secret would be refused."""
    names = {each["metadata"]["name"] for each in manifests.of("ConfigMap", "Secret")}
    used = set(re.findall(r"'name': '([\w-]+)'", str(manifests.workload("learner").container)))
    assert used & names == {"addresses", "sapo"}
    mounted = {
        each["secret"]["secretName"] for each in manifests.workload("learner").pod["volumes"] if "secret" in each
    }
    assert mounted == {"sapo-learner"}
    asked = manifests.workload("control-plane").pod["volumes"][0]["configMap"]["name"]
    assert re.fullmatch(r"run-\w{10}", asked), "another run.yaml is another pod"


# ---- The run's configuration


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_run_yaml_is_a_configuration_that_fits_its_pods(overlay: str, texts: dict[str, str]) -> None:
    config = load_config(KUBERNETES / "overlays" / overlay / "run.yaml")
    assert parse(RunConfig, config.model_dump(), where=overlay) == config
    manifests = Manifests(texts[overlay])
    limits = manifests.workload("rollout").container["resources"]["limits"]
    gpus = config.engine.vllm.tensor_parallel_size * config.engine.vllm.data_parallel_size
    assert limits.get("nvidia.com/gpu", 0) == (gpus if config.engine.name == "vllm" else 0)
    image = manifests.workload("rollout").container["image"].partition(":")[0]
    assert image == ("sapo/rollout-vllm" if config.engine.name == "vllm" else "sapo/learner")


def test_the_demo_is_the_demo() -> None:
    assert (KUBERNETES / "overlays/demo/run.yaml").read_text() == (ROOT / "deploy/examples/demo.yaml").read_text()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_registry_is_named_in_one_place(overlay: str, tmp_path: Path) -> None:
    copy = copied(tmp_path / "kubernetes")
    path = copy / "components" / "images" / "kustomization.yaml"
    path.write_text(re.sub(r"\{name: ([\w/-]+),", r"{name: \1, newName: registry.example.com/\1,", path.read_text()))
    for each in Manifests(rendered(copy / "overlays" / overlay)).workloads:
        assert re.fullmatch(r"registry\.example\.com/(sapo|valkey)/[\w-]+:[\d.]+", each.container["image"])


# ---- Monitoring and scaling


def test_prometheus_finds_the_same_services_on_the_same_ports_under_the_same_names(texts: dict[str, str]) -> None:
    manifests = Manifests(texts["gpu"])
    jobs = [each for each in yaml.safe_load((RULES / "prometheus.yml").read_text())["scrape_configs"]
            if "dns_sd_configs" in each]  # fmt: skip
    (endpoint,) = manifests.get("PodMonitor", "sapo")["spec"]["podMetricsEndpoints"]
    labels = {each["targetLabel"]: each for each in endpoint["relabelings"] if "targetLabel" in each}
    assert labels.keys() == {"run", "service", "process", "job"}
    for job in jobs:
        (where,) = job["dns_sd_configs"]
        (name,) = where["names"]
        assert job["job_name"] == labels["job"]["replacement"].replace("$1", name)
        service = manifests.get("Service", name)["spec"]
        assert service["clusterIP"] == "None", "or only one replica is found"
        assert manifests.workload(name).ports[endpoint["port"]] == where["port"]


def scaling(texts: dict[str, str]) -> Any:
    return Manifests(texts["gpu"]).get("ScaledObject", "rollout")["spec"]


def test_the_scaled_workload_is_there_and_says_no_number_of_its_own(texts: dict[str, str]) -> None:
    rollout = Manifests(texts["gpu"]).workload(scaling(texts)["scaleTargetRef"]["name"])
    assert (rollout.kind, "replicas" in rollout.spec) == ("Deployment", False)


def test_the_autoscaler_asks_for_metrics_that_are_defined_in_the_run_s_namespace(texts: dict[str, str]) -> None:
    (trigger,) = scaling(texts)["triggers"]
    selectors = Expression("ScaledObject", trigger["metadata"]["query"]).selectors
    assert {each.partition("{")[0] for each in selectors} == {
        "sapo_rollout_waiting_seconds_total", "sapo_rollout_tokens_total", "sapo_learner_waiting_seconds_total",
    } <= {each.name for metrics in METRICS.values() for each in metrics}  # fmt: skip
    namespace = Manifests(texts["gpu"]).of("Namespace")[0]["metadata"]["name"]
    assert {each.partition("{")[2] for each in selectors} == {f'namespace="{namespace}"}}'}


WORKERS = 4


# Seconds of waiting per 10 s, of each worker and of the learner -> workers wanted of the four that there are
@pytest.mark.parametrize(("worker", "learner", "wanted"), [
    (0, 5, 2.0), (5, 0, 0.5), (5, 5, 1.0), (0, 0, 1.0), (10, 0, 0.0), (0, 10, 10.0),
], ids=["learner waits", "workers wait", "both wait", "nobody waits", "workers idle", "learner idle"])  # fmt: skip
def test_the_autoscaler_s_figure_is_how_many_times_as_many_workers(
    worker: int, learner: int, wanted: float, texts: dict[str, str], tmp_path: Path
) -> None:
    def series(name: str, pod: str, growth: int, more: str = "") -> dict[str, str]:
        labels = f'namespace="sapo",process="{pod}"{more}'
        return {"series": f"{name}{{{labels}}}", "values": f"0+{growth}x60"}

    given = [series("sapo_learner_waiting_seconds_total", "learner", learner)]
    for pod in map(str, range(WORKERS)):
        given += [series("sapo_rollout_tokens_total", pod, 100),
                  series("sapo_rollout_waiting_seconds_total", pod, worker, ',reason="lookahead"'),
                  series("sapo_rollout_waiting_seconds_total", pod, 0, ',reason="lease"')]  # fmt: skip
    query = scaling(texts)["triggers"][0]["metadata"]["query"]
    case = {"expr": query, "eval_time": "8m", "exp_samples": [{"labels": "{}", "value": wanted}]}
    path = tmp_path / "scaling.test.yml"
    path.write_text(yaml.safe_dump({"tests": [{"interval": "10s", "input_series": given, "promql_expr_test": [case]}]}))
    done = subprocess.run([promtool(), "test", "rules", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- Redis


async def test_redis_starts_by_its_own_command_and_is_fit_for_a_run(texts: dict[str, str], tmp_path: Path) -> None:
    """The container's command and configuration with another server's binary, port and directory."""
    manifests = Manifests(texts["demo"])
    redis, port = manifests.workload("redis"), free_address().rpartition(":")[2]
    name = next(each["configMap"]["name"] for each in redis.pod["volumes"] if "configMap" in each)
    settings = manifests.get("ConfigMap", name)["data"]["redis.conf"].replace("/data", str(tmp_path))
    (tmp_path / "redis.conf").write_text(f"{settings}\nport {port}\nbind 127.0.0.1\n")
    (tmp_path / "valkey-server").symlink_to(EmbeddedRedis(tmp_path / "other").binary)
    command = [
        each.replace("/etc/redis/redis.conf", str(tmp_path / "redis.conf")) for each in redis.container["command"]
    ]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "REDIS_PASSWORD": "its-password"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        url = f"redis://:its-password@127.0.0.1:{port}/0"
        async with await RunStore.connect(url, "demo", patience=20) as store:  # refuses what may evict
            asked = [await store._redis.config_get(each) for each in ("appendonly", "appendfsync", "requirepass")]
        assert [value for each in asked for value in each.values()] == ["yes", "always", "its-password"]
        assert "its-password" not in Path(f"/proc/{server.pid}/cmdline").read_text()
    finally:
        server.terminate()
        server.wait(10)
