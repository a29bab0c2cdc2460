"""Your own problems: a file with one JSON object per line, each with a prompt and its answer.

    task: {name: jsonl, path: problems.jsonl, match: number}

    {"prompt": "What is 7 + 5?", "answer": "12"}

A prompt is a text, or a chat: a list of messages with role and content.

How a response is matched against the answer:
    exact    the whole response equals it, surrounding white space aside
    number   the last number in the response equals it as a number ("1,234.0" is 1234)
    regex    the last match of `pattern` (its first group that took part) equals it, as a number where both are numbers
    math     the last \\boxed{} is mathematically equivalent to it (needs `pip install 'sapo[tasks]'`)

Or `rewards` names functions as TRL has them; every field of the line is then passed on to them.

Held out are the problems of `held_out_path`, or else a fraction of all, chosen by the hash of the prompt: the same
prompt is on the same side in every run, however the file is ordered.
"""

import codecs
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from sapo_learner.config import did_you_mean
from sapo_learner.errors import ConfigError
from services.task_parts import answer_task
from services.task_parts.answer_task import AnswerTask
from services.tasks import Prompt, Split


class Jsonl(AnswerTask):
    path: Path
    """File with one JSON object per line, in UTF-8; relative to the working directory."""
    held_out_path: Path | None = None
    """File with the held-out problems, relative to the working directory; default: a fraction of `path`."""
    held_out_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of `path` that is held out, without held_out_path."""
    prompt_field: str = "prompt"
    """Key of the prompt in each line."""
    answer_field: str = "answer"
    """Key of the answer in each line; with `rewards`, a line may do without."""

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return self._splits[split]

    @cached_property
    def _splits(self) -> dict[Split, list[Prompt]]:
        everything = list(self._read(self.path))
        if self.held_out_path:
            return {"train": everything, "held_out": list(self._read(self.held_out_path))}
        return answer_task.split_by_prompt(everything, self.held_out_fraction, where=f"task.path {self.path}")

    def _read(self, path: Path) -> Iterator[Prompt]:
        key = "task.path" if path == self.path else "task.held_out_path"
        try:
            # Without the mark that some editors put first. Bytes are split, not text: a JSON string may hold what else
            # counts as the end of a line.
            lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
        except OSError as error:
            raise ConfigError(
                f"not readable: {error.strerror}", where=f"{key} {path}",
                fix="paths are relative to the working directory",
            ) from None  # fmt: skip
        empty = True
        for number, line in enumerate(lines, start=1):
            if line.strip():
                empty = False
                yield self._problem(_text(line, f"{path}:{number}"), f"{path}:{number}", f"{path.name}:{number}")
        if empty:
            raise ConfigError(
                "no problem in the file", where=f"{key} {path}", fix='add lines like {"prompt": "7+5=", "answer": "12"}'
            )

    def _problem(self, line: str, where: str, identifier: str) -> Prompt:
        try:
            data: Any = json.loads(line)
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ConfigError(
                "holds half a character (a lone surrogate, \\ud800 to \\udfff)", where=where, fix="mend that problem"
            ) from None
        except ValueError as error:
            raise ConfigError(f"not JSON: {error}", where=where, fix="every line is one JSON object") from None
        if not isinstance(data, dict):
            raise ConfigError("not a JSON object", where=where, fix='for example {"prompt": "7+5=", "answer": "12"}')
        content = answer_task.content_of(self._field(data, self.prompt_field, where), self.prompt_field, where=where)
        answer = ""
        if self.answer_field in data or not self.rewards:
            answer = answer_task.text_of(self._field(data, self.answer_field, where), self.answer_field, where=where)
        info = answer_task.info_of(self.columns_for_rewards(data), where=where)
        prompt = Prompt(id=identifier, content=content, answer=answer, info=info)
        self.check_problem(prompt, where=where)
        return prompt

    def _field(self, data: dict[str, Any], name: str, where: str) -> Any:
        if name not in data:
            fix = f"{did_you_mean(name, data)}; or set task.prompt_field and task.answer_field"
            raise ConfigError(f"no field {name!r}", where=where, fix=fix)
        return data[name]


def _text(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8: {error.reason}", where=where, fix="save the file as UTF-8") from None
