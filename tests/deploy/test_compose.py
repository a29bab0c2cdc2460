"""docker-compose.yml: valid with every profile, without a known secret, and every service as locked down as it can be.

Judged by Compose itself where there is one of version 2, else by the specification's schema (compose_spec/).
"""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from services.cli import app
from services.runtime.auth import Tokens
from services.runtime.roles import Role
from services.runtime.settings import Environment
from tests.documents import ROOT

FILE = ROOT / "docker-compose.yml"
EXAMPLE = ROOT / ".env.example"
SCHEMA = json.loads((Path(__file__).parent / "compose_spec" / "compose-spec.json").read_text())
PROFILES = sorted({profile for each in yaml.safe_load(FILE.read_text())["services"].values()
                   for profile in each.get("profiles", [])})  # fmt: skip
PROFILE_SETS = [each for size in range(len(PROFILES) + 1) for each in itertools.combinations(PROFILES, size)]
_VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)(?::-([^}]*))?\}")
OURS = ("sapo/",)


def compose() -> list[str]:
    """The command of Compose 2, or [] where there is none."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            version = subprocess.run([*command, "version", "--short"], capture_output=True, text=True, timeout=30)
            if version.returncode == 0 and version.stdout.strip().lstrip("v")[:1] not in ("", "1"):
                return command
    return []


def interpolated(text: str, values: dict[str, str]) -> dict[str, Any]:
    """The file as Compose reads it, as far as this one goes: ${NAME:-default}, $$, merge keys."""
    filled = _VARIABLE.sub(lambda match: values.get(match[1]) or match[2] or "", text)
    return dict(yaml.safe_load(filled.replace("$$", "$")))


def problems(text: str, profiles: tuple[str, ...], directory: Path) -> str:
    """What is wrong with a compose file, "" if nothing is."""
    if command := compose():
        (directory / "docker-compose.yml").write_text(text)
        wanted = [word for profile in profiles for word in ("--profile", profile)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COMPOSE_")}
        asked = subprocess.run(
            [*command, *wanted, "config", "--quiet"], cwd=directory, env=environment,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return "" if asked.returncode == 0 else asked.stderr or "refused"
    found = jsonschema.Draft7Validator(SCHEMA).iter_errors(interpolated(text, {}))
    return "\n".join(f"{error.json_path}: {error.message}" for error in found)


@pytest.mark.parametrize("profiles", PROFILE_SETS, ids=lambda each: "+".join(each) or "none")
def test_the_file_is_valid_with_every_profile(profiles: tuple[str, ...], tmp_path: Path) -> None:
    print("judged by", " ".join(compose()) or "the specification's schema")
    assert problems(FILE.read_text(), profiles, tmp_path) == ""


def test_the_judge_sees_a_key_and_a_condition_that_do_not_exist(tmp_path: Path) -> None:
    text = FILE.read_text()
    assert problems(text.replace("read_only: true", "readonly: true"), (), tmp_path)
    assert problems(text.replace("service_healthy", "service_is_healthy"), (), tmp_path)


def services() -> Iterator[tuple[str, dict[str, Any]]]:
    yield from interpolated(FILE.read_text(), {})["services"].items()


SERVICES = [pytest.param(service, id=name) for name, service in services()]


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_has_no_more_than_it_needs(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    limits = service["deploy"]["resources"]["limits"]
    assert {"memory", "pids"} <= limits.keys()
    assert "cpus" in limits or "gpu" in service["profiles"]
    assert service["healthcheck"]
    assert service["restart"]
    assert "privileged" not in service
    assert service.get("user") != "root"


@pytest.mark.parametrize("service", SERVICES)
def test_ports_are_published_on_this_machine_alone(service: dict[str, Any]) -> None:
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), port


@pytest.mark.parametrize("service", SERVICES)
def test_no_secret_has_a_value_that_is_known(service: dict[str, Any]) -> None:
    for name, value in (service.get("environment") or {}).items():
        if any(word in name for word in ("TOKEN", "PASSWORD", "SECRET")):
            assert value == "" or value.startswith("/secrets"), name


@pytest.mark.parametrize("service", [each for each in SERVICES if each.values[0]["image"].startswith(OURS)])
def test_a_service_of_ours_is_told_what_it_reads_and_runs_what_there_is(service: dict[str, Any]) -> None:
    known = {f"SAPO_{name.upper()}" for name in Environment.model_fields}
    known |= {"SAPO_SECRETS_DIR", "SAPO_HEALTH_ADDRESS"}
    assert {name for name in service["environment"] if name.startswith("SAPO_")} <= known
    words = [word for part in service["command"] for word in shlex.split(part)]
    if "serve" not in words:
        return
    _, command_name, *arguments = words[words.index("serve") :]
    command = typer.main.get_command(app).commands["serve"].commands[command_name]  # type: ignore[attr-defined]
    command.make_context(command_name, arguments).close()


@pytest.mark.parametrize("service", [each for each in SERVICES if each.values[0]["image"].startswith(OURS)])
def test_a_volume_is_mounted_where_the_image_has_a_directory_of_its_user(service: dict[str, Any]) -> None:
    """Else it would belong to root, and nothing could be written into it."""
    made = re.findall(r" mkdir (.*) \\\n    && chown sapo:sapo \1", (ROOT / service["build"]["dockerfile"]).read_text())
    named = [each.split(":")[1] for each in service["volumes"] if not each.startswith(("./", "/"))]
    assert set(named) <= set(made[0].split())


def test_the_stack_is_what_the_issue_of_a_run_needs() -> None:
    started = {name for name, service in services() if not service.get("profiles")}
    assert started == {
        "secrets", "redis", "control-plane", "ingest", "learner", "rollout", "prometheus", "grafana"
    }  # fmt: skip
    by_name = dict(services())
    assert by_name["rollout"]["deploy"]["replicas"] == 2
    redis = by_name["redis"]["command"]
    assert redis[redis.index("--appendonly") + 1] == "yes"
    assert redis[redis.index("--maxmemory-policy") + 1] == "noeviction"


def test_a_gpu_service_reserves_gpus_and_is_found_by_the_name_of_the_one_it_replaces() -> None:
    by_name = dict(services())
    for name, replaced in (("learner-gpu", "learner"), ("rollout-vllm", "rollout")):
        devices = by_name[name]["deploy"]["resources"]["reservations"]["devices"]
        assert [each["capabilities"] for each in devices] == [["gpu"]]
        assert by_name[name]["networks"]["default"]["aliases"] == [replaced]


def test_prometheus_asks_each_service_by_its_name_at_its_port() -> None:
    by_name = dict(services())
    jobs = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    for found in (each["dns_sd_configs"][0] for each in jobs if "dns_sd_configs" in each):
        (name,) = found["names"]
        assert f"0.0.0.0:{found['port']}" in " ".join(by_name[name]["command"])


def test_the_example_names_every_variable_with_its_default_and_no_other() -> None:
    asked = {name: default for name, default in _VARIABLE.findall(FILE.read_text())}
    lines = re.findall(r"^#([A-Z_]+)=(.*)$", EXAMPLE.read_text(), re.MULTILINE)
    assert {name for name, _ in lines} == asked.keys() | {"COMPOSE_PROFILES"}
    assert not re.findall(r"^[A-Z]", EXAMPLE.read_text(), re.MULTILINE), "what is set there would be an edit"
    first = {name: value for name, value in reversed(lines)}
    changed = {"SAPO_RUN", "SAPO_CPU_LEARNERS"}  # shown with another value
    assert {name: value for name, value in first.items() if name in asked and name not in changed} == {
        name: default for name, default in asked.items() if name not in changed
    }  # fmt: skip


SECRETS = ROOT / "deploy/docker/secrets.sh"


def make_secrets(directory: Path, **given: str) -> "subprocess.CompletedProcess[str]":
    environment = {"PATH": os.environ["PATH"], **given}
    return subprocess.run(
        ["sh", str(SECRETS)], cwd=directory, env=environment, capture_output=True, text=True, timeout=30
    )


def read(directory: Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_text() for path in files}


def test_secrets_are_made_once_and_are_what_the_services_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_secrets(tmp_path).returncode == 0
    made = read(tmp_path)
    assert make_secrets(tmp_path).returncode == 0
    assert read(tmp_path) == made
    secrets = [made[name] for name in ("sapo_token", "worker/sapo_token", "redis_password", "grafana/password")]
    assert len(set(secrets)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9]{40}", secret) for secret in secrets)
    for name in ("SAPO_TOKEN", "SAPO_REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SAPO_SECRETS_DIR", str(tmp_path))
    environment = Environment()
    assert environment.require("token") == made["sapo_token"]
    assert environment.require("redis_url") == f"redis://:{made['redis_password']}@redis:6379/0"
    assert made["redis.conf"] == f"requirepass {made['redis_password']}\n"


def test_secrets_that_are_given_are_taken_and_one_that_breaks_a_url_is_refused(tmp_path: Path) -> None:
    assert make_secrets(tmp_path, SAPO_TOKEN="mine-of-16-chars", REDIS_PASSWORD="one").returncode == 0
    assert make_secrets(tmp_path, REDIS_PASSWORD="two").returncode == 0
    made = read(tmp_path)
    assert (made["sapo_token"], made["sapo_redis_url"]) == ("mine-of-16-chars", "redis://:two@redis:6379/0\n")
    refused = make_secrets(tmp_path, REDIS_PASSWORD="a@b")
    assert refused.returncode == 2
    assert "REDIS_PASSWORD" in refused.stderr


def test_a_worker_has_a_token_that_only_works_and_nothing_else_of_the_run(tmp_path: Path) -> None:
    assert make_secrets(tmp_path).returncode == 0
    made = read(tmp_path)
    assert [name for name in made if name.startswith("worker/")] == ["worker/sapo_token"]
    accepted = Tokens.in_file(str(tmp_path / "tokens"))
    roles = [accepted.role(f"Bearer {made[name]}".encode()) for name in ("sapo_token", "worker/sapo_token")]
    assert roles == [Role.ADMIN, Role.WORKER]
    by_name = dict(services())
    for name in ("rollout", "rollout-vllm"):
        mounted = [each for each in by_name[name]["volumes"] if each.split(":")[1] == "/secrets"]
        assert mounted == ["secrets-worker:/secrets:ro"]
    for name in ("control-plane", "ingest"):
        assert by_name[name]["environment"]["SAPO_TOKENS_FILE"] == "/secrets/tokens"


def test_a_token_that_can_be_guessed_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    refused = make_secrets(tmp_path, SAPO_TOKEN="short")
    assert (refused.returncode, read(tmp_path)) == (2, {})
    assert "16 characters" in refused.stderr
