"""What a user is likely to get wrong: each one line on standard error (what, where, what to do) and an exit code."""

import asyncio
import json
import logging
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sapo_learner import checkpoint
from sapo_learner.policy import tiny_policy, write_policy
from services import health, run_directory, terminal
from services.run_directory import LocalServices
from services.runtime import lifecycle
from services.runtime.settings import RunConfig, dump_config
from tests.command_line import Outcome, sapo
from tests.small_run import Learner, Running, run_config

LONGEST = 800
CONFIG, UNAUTHENTICATED, NOT_FOUND, UNAVAILABLE, CORRUPT = 2, 4, 5, 8, 9


def says(outcome: Outcome, code: int, *fragments: str) -> None:
    """One line with all that must be in it, nothing on standard output, and the exit code."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert len(outcome.err) <= LONGEST
    for fragment in fragments:
        assert fragment in outcome.err


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lifecycle, "_end_after", lambda seconds: None)  # it would end the tests' process
    for name in ("CONTROL_PLANE_URL", "INGEST_ADDRESS", "REDIS_URL", "TOKEN"):
        monkeypatch.delenv(f"SAPO_{name}", raising=False)


# ---- Settings

SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["training.stps=5"], ["training.stps", "did you mean 'steps'", "config --explain"]),
    "unknown section": (["trainin.steps=5"], ["unknown key 'trainin'", "did you mean 'training'"]),
    "section as a value": (["training=5"], ["'training'", "section", "got 5"]),
    "ill-typed": (["training.steps=many"], ["'training.steps'", "valid integer", "got 'many'", "--explain"]),
    "ill-typed, long": ([f"training.steps={'x' * 5000}"], ["'training.steps'", "valid integer"]),
    "out of range": (["training.steps=0"], ["'training.steps'", "greater than or equal to 1", "got 0"]),
    "learning rate -1": (["optimizer.learning_rate=-1"], ["'optimizer.learning_rate'", "equal to 0"]),
    "learning rate inf": (["optimizer.learning_rate=.inf"], ["'optimizer.learning_rate'", "finite"]),
    "seed beyond 64 bits": (["run.seed=99999999999999999999"], ["'run.seed'", "less than"]),
    "run name": (["run.name=a/b"], ["'run.name'", "got 'a/b'"]),
    "engine": (["engine.name=vlm"], ["'engine.name'", "torch", "got 'vlm'"]),
    "unknown objective": (["objective.name=ppo"], ["objective", "'ppo'", "grpo", "gspo", "sapo"]),
    "objective, near": (["objective.name=sappo"], ["did you mean 'sapo'"]),
    "objective option": (["objective.tau=1"], ["objective 'sapo'", "unknown key 'tau'", "tau_neg, tau_pos"]),
    "objective option's value": (["objective.tau_pos=-1"], ["objective 'sapo'", "'tau_pos'", "greater than 0"]),
    "unknown task": (["task.name=arithmetics"], ["unknown task 'arithmetics'", "did you mean 'arithmetic'", "jsonl"]),
    "task option": (["task.held_out=3"], ["task arithmetic", "unknown key 'held_out'", "held_out_every"]),
    "jsonl without path": (["task.name=jsonl"], ["task jsonl", "'path' is required"]),
    "lookahead above age": (
        ["pacing.lookahead=9"], ["pacing.lookahead 9 exceeds training.max_policy_age 8", "lower lookahead"],
    ),
    "lookahead below publishing": (
        ["pacing.publish_every=5"], ["lookahead 2 is below pacing.publish_every - 1 = 4", "publish more often"],
    ),
    "top_p": (["sampling.top_p=0.9"], ["truncated sampling", "log-probs do not account for", "use top_p 1"]),
    "top_k": (["sampling.top_k=50"], ["truncated sampling", "log-probs do not account for", "top_k 0"]),
    "raw log-probs": (
        ["sampling.logprob_mode=raw", "sampling.temperature=0.7"],
        ["raw log-probs at temperature 0.7", "use log-prob mode processed"],
    ),
    "group of one": (["sampling.group_size=1"], ["group_size 1 teaches nothing", "use 2 or more"]),
    "too large a message": (
        ["sampling.group_size=64", "sampling.max_tokens=200000"],
        ["up to 109 MiB", "one message holds 64", "lower max_tokens to 116508, or group_size"],
    ),
    "nothing held out to warm-start": (["task.held_out_every=2000000000"], ["warm start", "hold some out"]),
    "model that is not there": (["policy.source=/none"], ["policy.source /none", "no such directory", "or tiny"]),
    "ranks and copies": (
        ["parallel.processes=4", "parallel.shard=3"],
        ["parallel.processes 4 cannot share", "3 by 3", "set parallel.shard to a divisor of 4"],
    ),
    "ranks and adapters": (
        ["parallel.processes=2", "policy.lora={}"],
        ["policy.lora: adapters are trained by one process", "parallel.processes to 1"],
    ),
    "malformed --set": (["training.steps"], ["--set", "'training.steps' is not KEY=VALUE", "for example"]),
    "--set that is no YAML": (["training.steps=["], ["--set", "not readable as YAML", "quote"]),
    "interpolation": (["run.name=${nowhere}"], ["--set", "nowhere"]),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "fragments"), SETTINGS.values(), ids=SETTINGS)
def test_setting(overrides: list[str], fragments: list[str]) -> None:
    says(sapo("config", *(f"--set={each}" for each in overrides)), CONFIG, *fragments)


FILES: dict[str, tuple[bytes, list[str]]] = {
    "not YAML": (b"training: {steps: 5", ["not readable as YAML", "line 1", "prints a complete example"]),
    "a list": (b"- training", ["not a mapping", "for example"]),
    "a number": (b"5", ["not readable as YAML"]),
    "binary": (b"\x00\xff\xfe", ["not readable as YAML"]),
    "no key": (b"null: 3", ["not readable as YAML"]),
    "too deep": (b"- " * 3000, ["not readable as YAML"]),
    "code": (b"run: !!python/object/apply:os.system [ls]", ["not readable as YAML"]),
}


@pytest.mark.parametrize(("content", "fragments"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("command", ["config", "up"])
def test_file(tmp_path: Path, command: str, content: bytes, fragments: list[str]) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    says(sapo(command, "run.yaml"), CONFIG, "run.yaml: ", *fragments)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run.yaml"]


def test_file_that_is_missing_or_a_directory(tmp_path: Path) -> None:
    says(sapo("up", "none.yaml"), CONFIG, "none.yaml: no such file", "`sapo config` prints a complete example")
    says(sapo("up", tmp_path), CONFIG, str(tmp_path), "Is a directory")


# ---- A file of problems

GOOD = '{"prompt": "1+1=", "answer": "2"}\n'
PROBLEMS: dict[str, tuple[bytes, list[str], list[str]]] = {
    "not JSON": ((GOOD + "{'prompt'}\n").encode(), [], ["p.jsonl:2: not JSON", "every line is one JSON object"]),
    "not an object": ((GOOD + "[1]\n").encode(), [], ["p.jsonl:2: not a JSON object", "for example"]),
    "no answer": (b'{"prompt": "a"}', [], ["p.jsonl:1: no field 'answer'", "answer_field"]),
    "another name": (b'{"promt": "a", "answer": "b"}', [], ["did you mean 'promt'", "prompt_field"]),
    "answer is true": (b'{"prompt": "a", "answer": true}', [], ["p.jsonl:1: 'answer' is True", "mend that problem"]),
    "half a character": (rb'{"prompt": "a\ud800", "answer": "b"}', [], ["p.jsonl:1: holds half a character"]),
    "blank prompt": (b'{"prompt": " ", "answer": "b"}', [], ["p.jsonl:1: 'prompt' is ' '"]),
    "encoding": (GOOD.encode() + '{"prompt": "à", "answer": "b"}'.encode("latin-1"), [], ["p.jsonl:2: not UTF-8"]),
    "empty": (b"\n\n", [], ["task.path p.jsonl", "no problem in the file", "add lines"]),
    "all held out": (GOOD.encode(), ["held_out_fraction=0.999999999"], ["none is left to train on", "lower"]),
    "not a number": (b'{"prompt": "a", "answer": "b"}', ["match=number"], ["p.jsonl:1", "'b' is not a number"]),
    "no pattern": (GOOD.encode(), ["match=regex"], ["task jsonl", "pattern and match: regex belong together"]),
    "bad pattern": (GOOD.encode(), ["match=regex", "pattern=("], ["'(' is no regular expression", "backslash"]),
    "held-out file missing": (GOOD.encode(), ["held_out_path=h.jsonl"], ["task.held_out_path h.jsonl", "No such file"]),
    "option": (GOOD.encode(), ["macth=exact"], ["unknown key 'macth'", "did you mean 'match'"]),
    "tiny policy": (GOOD.encode() * 40, [], ["task 'jsonl' has no demonstrations", "give the directory"]),
}


@pytest.mark.parametrize(("content", "options", "fragments"), PROBLEMS.values(), ids=PROBLEMS)
def test_problems(tmp_path: Path, content: bytes, options: list[str], fragments: list[str]) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    settings = ["task.name=jsonl", "task.path=p.jsonl", *(f"task.{each}" for each in options)]
    says(sapo("config", *(f"--set={each}" for each in settings)), CONFIG, *fragments)


def test_problems_that_are_not_there_or_lie_beside_the_file(tmp_path: Path) -> None:
    says(sapo("config", "--set=task={name: jsonl, path: p.jsonl}"), CONFIG, "task.path p.jsonl", "working directory")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "p.jsonl").write_text(GOOD)
    (tmp_path / "project" / "run.yaml").write_text("task: {name: jsonl, path: p.jsonl}")
    fragments = ("task.path", "p.jsonl is not in the working directory", "use project/p.jsonl, or start from project")
    for command in ("config", "up"):
        says(sapo(command, "project/run.yaml"), CONFIG, *fragments)


# ---- Models and policies


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    write_policy(tiny_policy("0123456789+-=()>", seed=0), directory)
    return directory


def copied(policy: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for each in policy.iterdir():
        (target / each.name).write_bytes(each.read_bytes())
    return target


def without(*names: str) -> Callable[[Path], None]:
    def remove(directory: Path) -> None:
        for each in names:
            (directory / each).unlink()

    return remove


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text)


MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (without("config.json"), ["no config.json there"]),
    "broken config": (written("config.json", "{"), ["config.json is not readable", "copy the model"]),
    "config of something else": (written("config.json", "{}"), ["config.json names no model_type"]),
    "no language model": (written("config.json", '{"model_type": "vit"}'), ["'vit' is no causal language model"]),
    "no weights": (without("model.safetensors"), ["no weights there", "copy the whole"]),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), ["no tokenizer there", "copy the whole"]),
}


@pytest.mark.parametrize(("spoil", "fragments"), MODELS.values(), ids=MODELS)
def test_model_directory(tmp_path: Path, policy: Path, spoil: Callable[[Path], object], fragments: list[str]) -> None:
    spoil(copied(policy, tmp_path / "m"))
    says(sapo("config", "--set=policy.source=m"), CONFIG, "policy.source m", *fragments)
    outcome = sapo("sample", "m", "--prompt", "1+1=")
    says(outcome, NOT_FOUND if "no config.json there" in fragments else CONFIG, "m")


def test_weights_cut_short(tmp_path: Path, policy: Path) -> None:
    weights = copied(policy, tmp_path / "m") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    says(sapo("sample", "m", "--prompt", "1+1="), CONFIG, "policy m")


def test_prompt_without_a_token(policy: Path) -> None:
    says(sapo("sample", policy, "--prompt", ""), CONFIG, "--prompt", "no token")


def a_run(directory: Path, policy: Path, *steps: int, **sections: Any) -> RunConfig:
    """A run that has stopped after a few steps, with checkpoints."""
    config = run_config(directory, policy={"source": str(policy)}, **sections)
    copied(policy, directory / "model")
    (directory / "run.yaml").write_text(dump_config(config))
    (directory / "record.jsonl").write_text(
        "".join(json.dumps({"kind": "step", "time": 1.0, "step": each}) + "\n" for each in steps)
    )
    tensors = tiny_policy("0123456789+-=()>", seed=0).tensors()
    for step in steps:
        state = checkpoint.CheckpointState(step, step, "", {}, dict(tensors), {}, {})
        checkpoint.save(directory / "checkpoints", state, token=1)
    return config


def test_a_step_that_is_not_kept(tmp_path: Path, policy: Path) -> None:
    a_run(tmp_path / "r", policy, 2, 4)
    says(sapo("sample", "r@3", "--prompt", "1+1="), NOT_FOUND, "no checkpoint of step 3", "steps here: 2, 4")
    says(sapo("up", "r/run.yaml", "--set=run={name: new, dir: new}", "--from=r@3"), NOT_FOUND, "steps here: 2, 4")
    says(sapo("up", "r/run.yaml", "--set=run={name: new, dir: new}", "--from=n"), NOT_FOUND, "n: neither a run")


def test_a_checkpoint_that_is_damaged_and_then_all(tmp_path: Path, policy: Path) -> None:
    a_run(tmp_path / "r", policy, 2, 4)
    older, newer = sorted((tmp_path / "r" / "checkpoints").iterdir())
    damage(newer / "model.safetensors")
    outcome = sapo("sample", "r", "--prompt", "1+1=", "--max-tokens", 2)
    assert outcome.code == 0
    assert all(text in outcome.err for text in ("passed over", newer.name, "the policy of step 2 is taken"))
    damage(older / "model.safetensors")
    outcome = sapo("sample", "r", "--prompt", "1+1=")
    says(outcome, CORRUPT, "no usable checkpoint", older.name, newer.name, "restore one from a copy")


def damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_from_together_with_a_run_that_has_begun(tmp_path: Path, policy: Path) -> None:
    a_run(tmp_path / "r", policy, 2)
    outcome = sapo("up", "r/run.yaml", f"--from={policy}")
    says(outcome, CONFIG, f"--from {policy} begins a new run, but this one has begun", "leave --from out", "--again")
    assert not list(tmp_path.glob("r-from-*"))


def test_another_up_on_the_directory(tmp_path: Path, policy: Path) -> None:
    a_run(tmp_path / "r", policy, 2)
    process = psutil.Process()
    LocalServices(process.pid, process.create_time(), "http://x", "x:1", "", "t", {}).write(tmp_path / "r")
    says(sapo("up", "r/run.yaml"), UNAVAILABLE, "another `sapo up` runs on this directory", "r", "stop it first")
    says(sapo("up", "r/run.yaml", "--from=r@2"), UNAVAILABLE, "another `sapo up` runs on this directory")


def test_services_json_that_is_broken(tmp_path: Path, policy: Path) -> None:
    a_run(tmp_path / "r", policy, 2)
    (tmp_path / "r" / "services.json").write_text("{")
    says(sapo("status", "r"), CORRUPT, "services.json", "remove it")


def test_changes_that_would_make_it_another_run(tmp_path: Path, policy: Path) -> None:
    a_run(tmp_path / "r", policy, 2)
    outcome = sapo("up", "r/run.yaml", "--set=sampling.group_size=4", "--set=training.groups_per_step=7")
    says(outcome, CONFIG, "cannot change", "sampling.group_size: 2 -> 4; training.groups_per_step: 2 -> 7", "--again")


def test_a_run_that_is_complete(tmp_path: Path, policy: Path) -> None:
    a_run(tmp_path / "r", policy, 5)
    (tmp_path / "r" / "summary.json").write_text('{"steps": 5}')
    says(sapo("up", "r/run.yaml"), CONFIG, "this run is complete", "training.steps", "--again")


def test_eval_without_held_out_problems(tmp_path: Path, policy: Path) -> None:
    outcome = sapo("eval", policy, "--set=task.held_out_every=2000000000")
    says(outcome, CONFIG, "task arithmetic", "no prompt is held out", "held_out")


# ---- Runs and addresses

DIRECTORIES = {
    "no directory": ("none", "no"),
    "no run": (".", "no run.yaml there"),
}


@pytest.mark.parametrize(("run", "expected"), DIRECTORIES.values(), ids=DIRECTORIES)
@pytest.mark.parametrize("command", ["status", "ledger"])
def test_directory_that_is_no_run(command: str, run: str, expected: str) -> None:
    says(sapo(command, run), NOT_FOUND, run, expected, "give")


COMMANDS: dict[str, tuple[list[str], int, list[str]]] = {
    "command": (["statu"], CONFIG, ["statu", "Did you mean 'status'", "sapo --help"]),
    "service": (["serve", "learnr"], CONFIG, ["learnr", "Did you mean 'learner'", "sapo serve --help"]),
    "option": (["up", "x", "--agian"], CONFIG, ["--agian", "--again", "sapo up --help"]),
    "argument": (["eval"], CONFIG, ["'POLICY'", "sapo eval --help"]),
    "value": (["eval", "x", "--samples", "many"], CONFIG, ["'--samples'", "valid integer", "sapo eval --help"]),
    "key": (["config", "--explain", "training.stps"], CONFIG, ["--explain", "did you mean 'steps'"]),
    "gRPC address": (["health", "127.0.0.1"], CONFIG, ["'127.0.0.1' is not HOST:PORT", "for example"]),
    "port": (["health", "http://127.0.0.1:99999"], CONFIG, ["not http://HOST:PORT", "for example"]),
    "host": (["health", "http://:80"], CONFIG, ["not http://HOST:PORT", "for example"]),
    "nobody there": (["health", "http://127.0.0.1:1"], UNAVAILABLE, ["http://127.0.0.1:1: no answer", "running there"]),
    "nobody on gRPC": (["health", "127.0.0.1:1"], UNAVAILABLE, ["127.0.0.1:1: no answer", "is ingest running"]),
    "status without token": (["status", "http://127.0.0.1:1"], CONFIG, ["SAPO_TOKEN: not set", "services.json"]),
    "eval without token": (["eval", "http://127.0.0.1:1"], CONFIG, ["SAPO_TOKEN: not set", "services.json"]),
    "rollout without environment": (["serve", "rollout"], CONFIG, ["SAPO_", "not set", "set it to"]),
    "learner without environment": (["serve", "learner"], CONFIG, ["SAPO_", "not set", "set it to"]),
    "ingest without environment": (["serve", "ingest"], CONFIG, ["SAPO_", "not set", "set it to"]),
}


@pytest.mark.parametrize(("arguments", "code", "fragments"), COMMANDS.values(), ids=COMMANDS)
def test_command_line(arguments: list[str], code: int, fragments: list[str]) -> None:
    says(sapo(*arguments), code, *fragments)


@pytest.mark.parametrize(
    ("listen", "fragments"),
    [("8080", ["'8080' is not HOST:PORT", "for example"]), (None, ["another process listens there", "choose another"])],
)
def test_listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listen: str | None, fragments: list[str]) -> None:
    monkeypatch.setenv("SAPO_TOKEN", "t")
    monkeypatch.setenv("SAPO_REDIS_URL", "redis://127.0.0.1:1")
    (tmp_path / "run.yaml").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = listen or f"127.0.0.1:{taken.getsockname()[1]}"
        says(sapo("serve", "control-plane", "run.yaml", "--listen", address), CONFIG, address, *fragments)


def test_nobody_answers_for_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (health, run_directory):
        monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setenv("SAPO_TOKEN", "t")
    for command in (["status"], ["sample", "--prompt=1"]):
        says(sapo(*command, "http://127.0.0.1:1"), UNAVAILABLE, "http://127.0.0.1:1", "is it running")


async def test_wrong_token_and_a_version_that_is_not_kept(
    running: Running, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAPO_TOKEN", "another")
    monkeypatch.setattr(logging.getLogger("services.runtime.seldom"), "disabled", True)  # the server's, in this process
    for command in ("status", "ledger", "eval"):
        outcome = await asyncio.to_thread(sapo, command, running.url)
        says(outcome, UNAUTHENTICATED, "wrong or missing token", "set SAPO_TOKEN")
    monkeypatch.setenv("SAPO_TOKEN", "the-run's-token")
    outcome = await asyncio.to_thread(sapo, "eval", f"{running.url}@7")
    says(outcome, NOT_FOUND, running.url, "no published policy of step 7", "kept are steps 0")


async def test_something_else_answers_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nConnection: close\r\n\r\n<h1>A</h1>")
        await writer.drain()
        writer.close()

    monkeypatch.setenv("SAPO_TOKEN", "t")
    async with await asyncio.start_server(page, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for command, code in (("status", 1), ("ledger", 1), ("health", UNAVAILABLE)):
            says(await asyncio.to_thread(sapo, command, url), code, url, "address?")


# ---- The machine


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device", "/r/x"), "/r/x: No space left on device (make room"),
        (PermissionError(13, "Permission denied", "/r"), "/r: Permission denied (get access"),
        (MemoryError(), "out of memory (free some"),
        (ExceptionGroup("g", [OSError(28, "No space left on device")]), "No space left on device"),
    ],
)
def test_machine(monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(terminal.typer, "echo", lambda text, err=False, nl=True: print(text) if err else fail(text))
    monkeypatch.setattr(terminal, "warn", lambda text: print(f"sapo: {text}", file=terminal.sys.stderr))
    outcome = sapo("config", "--explain", "training.steps")
    says(outcome, 1, expected)


def test_directory_of_the_run_is_a_file(tmp_path: Path, policy: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "run.yaml").write_text(
        f"policy: {{source: {policy}}}\nrun: {{dir: file/run}}\nsampling: {{max_tokens: 9}}"
    )
    outcome = sapo("up", "run.yaml")
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1
    assert "file/run" in outcome.err
    assert "Not a directory" in outcome.err


def jsonl_run(tmp_path: Path, policy: Path, max_tokens: int = 9) -> list[str]:
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+1+1+1=", "answer": "4"}\n')
    settings = ["task.name=jsonl", "task.path=p.jsonl", f"policy.source={policy}", f"sampling.max_tokens={max_tokens}"]
    return ["config", *(f"--set={each}" for each in settings)]


def test_responses_that_do_not_fit_the_model(tmp_path: Path, policy: Path) -> None:
    outcome = sapo(*jsonl_run(tmp_path, policy, max_tokens=250))
    assert outcome.code == 2
    for fragment in ("sampling.max_tokens", "the longest prompt has 8 tokens", "context of 256", "at most 248"):
        assert fragment in outcome.err
    assert sapo(*jsonl_run(tmp_path, policy, max_tokens=248)).code == 0


def test_a_tokenizer_of_another_model(tmp_path: Path, policy: Path) -> None:
    policy = shutil.copytree(policy, tmp_path / "model")
    configuration = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(configuration | {"vocab_size": 5}))
    outcome = sapo(*jsonl_run(tmp_path, policy))
    assert outcome.code == 2
    assert "its tokenizer gives token ids up to " in outcome.err
    assert "the model knows only 5" in outcome.err


def test_a_chat_template_is_said_to_be_applied_and_can_be_left_out(tmp_path: Path, policy: Path) -> None:
    policy = shutil.copytree(policy, tmp_path / "model")
    (policy / "chat_template.jinja").write_text("{{ messages }}")
    outcome = sapo(*jsonl_run(tmp_path, policy))
    assert outcome.code == 0
    assert "prompts go to the policy through its tokenizer's chat template; chat.template: none" in outcome.err
    assert "chat template" not in sapo(*jsonl_run(tmp_path, policy), "--set", "chat.template=none").err


def test_prompts_that_are_trained_on_and_held_out(tmp_path: Path, policy: Path) -> None:
    (tmp_path / "h.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer": "3"}\n')
    outcome = sapo(*jsonl_run(tmp_path, policy), "--set", f"task.held_out_path={tmp_path}/h.jsonl")
    assert outcome.code == 0
    assert "1 prompts of task jsonl are trained on and held out, too: its pass@1 will flatter" in outcome.err


def test_a_chat_template_that_cannot_write_the_prompts(tmp_path: Path, policy: Path) -> None:
    policy = shutil.copytree(policy, tmp_path / "model")
    (policy / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    outcome = sapo(*jsonl_run(tmp_path, policy))
    assert outcome.code == 2
    assert "the chat template cannot write it: no such role" in outcome.err


def test_eval_of_a_model_directory_without_a_word_on_the_problems(policy: Path) -> None:
    outcome = sapo("eval", str(policy))
    assert outcome.code == 2
    assert "give --config RUN_YAML" in outcome.err
