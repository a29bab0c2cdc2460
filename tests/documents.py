"""What the documents tell people to write and to run: fenced blocks, taken out of Markdown.

    `words.py`:             a line of only this before a fence names the file that the block is

A command that no test runs carries its reason, visibly, as a comment: `sapo up big.yaml  # needs: 8 GPUs`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"`([\w./-]+)`:\s*\Z")
_TOOLS = "sapo|make|torchrun|kubectl|docker"
_INDENTED = re.compile(rf"^ {{4}}(?=(?:\.venv/bin/)?(?:{_TOOLS}) )(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    document: str
    language: str
    text: str
    name: str  # of the file that it is, or ""


@dataclass(frozen=True)
class Command:
    document: str
    text: str  # without its comment
    comment: str

    @property
    def excused(self) -> bool:
        """Whether it says why no test runs it."""
        return self.comment.startswith(("needs: ", "takes: ", "changes: "))


def blocks(document: Path) -> Iterator[Block]:
    text = document.read_text()
    for match in _FENCE.finditer(text):
        name = _NAME.search(text[: match.start()].rstrip())
        yield Block(document.name, match[1], match[2], name[1] if name else "")


def files(document: Path) -> dict[str, str]:
    """Those that the document has people write, by name."""
    return {block.name: block.text for block in blocks(document) if block.name}


def commands(document: Path) -> list[Command]:
    """Commands of these tools in shell blocks and indented lines, in order; a line that ends in \\ goes on."""
    shell = [block.text for block in blocks(document) if block.language == "sh"]
    lines = "\n".join([*shell, *_INDENTED.findall(document.read_text())]).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        text, _, comment = line.strip().partition("#")
        if re.match(rf"(\.venv/bin/)?({_TOOLS}) ", text):
            found.append(Command(document.name, text.strip().removeprefix(".venv/bin/"), comment.strip()))
    return found


def write_files(document: Path, directory: Path) -> None:
    """`files` into a directory, as a reader would."""
    for name, text in files(document).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def named(commands: list[Command]) -> list[object]:
    """As parameters of a test, each with a name of its own."""
    return [pytest.param(each, id=f"{each.document}: {each.text}") for each in commands]
