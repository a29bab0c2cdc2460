"""Secrets are where they are kept, and nowhere else: not in logs, answers, metrics, errors, or a process' arguments."""

import logging
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from pydantic import SecretStr

from sapo_learner.errors import SapoError
from services.control_plane.service import serve as serve_control_plane
from services.runstore import EmbeddedRedis
from services.runtime.lifecycle import Lifecycle
from services.runtime.logging import OURS
from services.runtime.settings import Environment, RunConfig, dump_config
from services.runtime.tls import Tls
from tests.certificates import Certificates
from tests.command_line import sapo
from tests.small_run import free_address
from tests.system import jsonl_run, system

TOKENS = {role: f"s3cret-{role}-d0-n0t-t3ll" for role in ("viewer", "worker", "learner", "admin")}
REDIS_PASSWORD = "s3cret-redis-d0-n0t-t3ll"
SECRETS = (*TOKENS.values(), REDIS_PASSWORD)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """Of the environment: a tokens file, certificates, and their keys among what must not be told."""
    (tmp_path / "tokens").write_text("".join(f"{role}: {token}\n" for role, token in TOKENS.items()))
    made = Certificates(tmp_path / "certificates")
    cert, key = made.pair("all")
    return {"tokens_file": str(tmp_path / "tokens"), "tls_cert": cert, "tls_key": key, "tls_ca": made.ca}


async def told_by(addresses: dict[str, str], files: dict[str, Any]) -> str:
    """All that the control plane says to who asks, with every token and none, and to who is wrong."""
    heard = []
    context = Tls(ca=files["tls_ca"]).client_context()()
    async with httpx.AsyncClient(base_url=f"https://{addresses['control-plane']}", verify=context) as http:
        for token in (*TOKENS.values(), REDIS_PASSWORD, "wrong"):
            headers = {"Authorization": f"Bearer {token}"}
            for path in ("/", "/metrics", "/readyz", "/healthz", "/v1/config", "/v1/status", "/v1/history", "/v1/x"):
                answer = await http.get(path, headers=headers)
                heard.append(answer.text + str(answer.headers))
            heard.append((await http.post("/v1/leases", headers=headers, json={"worker": 1})).text)
            heard.append((await http.post("/login", data={"token": token})).text)
    return "".join(heard)


async def test_a_run_tells_nobody(
    tmp_path: Path, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for ours in OURS:
        caplog.set_level(logging.DEBUG, logger=ours)
    role = {"ingest": "viewer", "learner": "learner", "rollout": "worker", "viewer": "viewer", "control": "admin"}
    config = jsonl_run(tmp_path / "files", 4, "1", training={"steps": 2, "groups_per_step": 2})

    def secured(service: str) -> dict[str, Any]:
        return files | {"token": SecretStr(TOKENS[role[service]])}

    with EmbeddedRedis(tmp_path / "redis", password=REDIS_PASSWORD) as redis:
        async with system(config, redis.url, secured=secured) as running:
            await running.control.status()  # waits for it to be there
            heard = await told_by(running.addresses, files)
            await running.finished()
            arguments = " ".join(
                word for each in psutil.process_iter(["cmdline"]) for word in each.info["cmdline"] or []
            )
    written = "".join(
        path.read_text("utf-8", "replace") for path in config.run.directory.rglob("*")
        if path.is_file() and path.suffix in (".yaml", ".json", ".jsonl", ".log", ".token")
    )  # fmt: skip
    key = Path(files["tls_key"]).read_text().splitlines()[1]
    for secret in (*SECRETS, key):
        for place, text in {
            "log": caplog.text, "answers": heard, "arguments": arguments, "files": written,
            "config": dump_config(config),
        }.items():  # fmt: skip
            assert secret not in text, f"a secret in the {place}"


@pytest.mark.parametrize(
    "command", [["config"], ["config", "--explain", "run"], ["status", "http://127.0.0.1:1"], ["ledger", "runs/none"]]
)
def test_the_command_line_tells_nobody(
    command: list[str], files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.health.PATIENCE_SECONDS", 0.2)
    monkeypatch.setenv("SAPO_TOKEN", TOKENS["admin"])
    monkeypatch.setenv("SAPO_REDIS_URL", f"redis://:{REDIS_PASSWORD}@127.0.0.1:1/0")
    for name, path in files.items():
        monkeypatch.setenv(f"SAPO_{name.upper()}", path)
    outcome = sapo(*command)
    assert not any(secret in outcome.out + outcome.err for secret in SECRETS)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{REDIS_PASSWORD}@127.0.0.1:1/0", f"redis://:{REDIS_PASSWORD}@127.0.0.1:port/0",
        f"http://:{REDIS_PASSWORD}@127.0.0.1/0", f"redis://:{REDIS_PASSWORD}@127.0.0.1:1/nought",
        f"rediss://:{REDIS_PASSWORD}@127.0.0.1:1/0?ssl_cert_reqs=sometimes",
    ],
)  # fmt: skip
async def test_an_address_of_redis_that_will_not_do_is_said_without_its_password(
    url: str, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    environment = Environment(redis_url=SecretStr(url), token=SecretStr(TOKENS["admin"]), patience_seconds=0.1)
    with pytest.raises((SapoError, ExceptionGroup)) as caught:
        await serve_control_plane(Lifecycle(), config, environment, listen=free_address())
    assert REDIS_PASSWORD not in f"{caught.value}{caught.value!r}{caplog.text}{environment!r}"


async def test_an_environment_shows_no_secret() -> None:
    shown = repr(Environment(token=SecretStr(TOKENS["admin"]), redis_url=SecretStr(f"redis://:{REDIS_PASSWORD}@h")))
    assert not any(secret in shown for secret in SECRETS)
