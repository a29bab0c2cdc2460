"""What README and docs tell people to type works: run here, or excused in plain sight and then at least parsed.

docs/first-run.md is followed as a whole in test_first_run.py.
"""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

from sapo_learner.config import parse
from services.cli import app
from services.runtime.settings import RunConfig
from tests.documents import DOCUMENTS, ROOT, Command, blocks, commands, named, write_files

COMMANDS = [command for document in DOCUMENTS for command in commands(document)]
_SPAN = re.compile(r"`(sapo [a-z][^`]*)`")
cli = typer.main.get_command(app)


def click_command(words: list[str]) -> tuple[object, list[str]]:
    """The command that the words name, and the words that are its own."""
    command: object = cli
    while hasattr(command, "commands") and words:
        name, *words = words
        assert name in command.commands, f"no command {name!r}"
        command = command.commands[name]
    return command, words


def inside_a_container(words: list[str]) -> list[str]:
    """What `docker compose exec SERVICE sapo ...` asks of `sapo`, [] for another command of Compose."""
    compose, command, *rest = words
    assert (compose, command in {"up", "exec", "stop", "down"}) == ("compose", True), words
    if command != "exec":
        return []
    service, program, *arguments = rest
    assert service in yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return arguments if program == "sapo" else []


def test_a_command_for_a_container_is_taken_apart() -> None:
    asked = ["compose", "exec", "control-plane", "sapo", "ledger", "/runs/demo"]
    assert inside_a_container(asked) == ["ledger", "/runs/demo"]
    assert inside_a_container(["compose", "exec", "redis", "cat", "/secrets/redis.conf"]) == []
    assert inside_a_container(["compose", "up"]) == []
    with pytest.raises(AssertionError):
        inside_a_container(["compose", "exec", "nobody", "sapo", "ledger", "/runs/demo"])


@pytest.mark.parametrize("command", named(COMMANDS))
def test_every_command_is_understood_by_its_own_tool(command: Command) -> None:
    tool, *words = shlex.split(command.text)
    if tool == "make":
        targets = {word for word in words if "=" not in word}
        assert command.excused or targets <= {"install", "lint", "test", "test-vllm"}, "CI runs no other"
        outcome = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, timeout=20)
        assert outcome.returncode == 0, outcome.stderr
        return
    if tool == "kubectl":
        assert command.excused
        return
    if tool == "docker":
        assert command.excused
        words = inside_a_container(words)
        if not words:
            return
    if tool == "torchrun":
        asked = get_args_parser().parse_args(words)
        assert asked.module
        assert asked.training_script == "services.cli"
        words = asked.training_script_args
    found, arguments = click_command(words)
    found.make_context("sapo", arguments, resilient_parsing=False).close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_in_the_text_exists_with_its_options(document: Path) -> None:
    for span in _SPAN.findall(document.read_text()):
        words = re.sub(r"[\[\]|\\]", " ", span).split()[1:]
        name = words[0]
        assert name in cli.commands, span  # type: ignore[attr-defined]
        command = cli.commands[name]  # type: ignore[attr-defined]
        known = {option for each in [command, *getattr(command, "commands", {}).values()]
                 for parameter in each.params for option in parameter.opts}  # fmt: skip
        asked = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert asked <= known | {"--help"}, span


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_configuration_has_known_keys_and_values(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(document, tmp_path)
    for block in blocks(document):
        if block.language == "yaml":
            data = yaml.safe_load(block.text)
            if isinstance(data, dict) and data.keys() <= RunConfig.model_fields.keys():
                parse(RunConfig, data, where=f"{document.name}: {block.text[:60]}")
            else:  # another tool's, which must say so
                assert block.name, f"{document.name}: a YAML that is no configuration has its file's name before it"
