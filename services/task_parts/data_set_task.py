"""The half of a task that reads a data set: which column is the prompt, which the answer, what else goes along."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from sapo_learner.config import did_you_mean
from sapo_learner.errors import ConfigError
from services.task_parts import answer_task, matching, templates
from services.task_parts.dataset_files import load_rows
from services.tasks import Prompt, Split, Task

log = logging.getLogger(__name__)
ROW = "row"


class DataSetTask(Task):
    path: Path  # also of an id on the Hub: one that lies beside run.yaml is then found by those who look for paths
    """A file (.json, .jsonl, .csv, .parquet) or directory, also one of save_to_disk, relative to the working directory;
    or, where there is none, the id of a data set on the Hugging Face Hub, such as openai/gsm8k. Needs
    `pip install 'sapo[tasks]'`."""
    config: str = ""
    """Which of the data set's configurations, where it has several."""
    revision: str = ""
    """Commit of a data set on the Hub, which needs one: then the problems are the same whenever the run goes on."""
    split: str = "train"
    """The split to train on, also a part such as train[:1000]. A single file has one split, train."""
    held_out_split: str = ""
    """The split to hold out; default: a fraction of `split`. A prompt in both is not trained on."""
    held_out_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of `split` that is held out, without held_out_split, chosen by the hash of the prompt."""
    prompt_column: str = "prompt"
    """Column with the prompts: texts, or chats as lists of messages with role and content."""
    prompt_template: str = ""
    """In place of prompt_column: a Jinja template over the columns, such as "{{ question }} Answer in \\boxed{}."; a
    column whose name is no identifier is {{ row["its name"] }}."""
    answer_column: str = "answer"
    """Column with the answers; where nothing is held against an answer, it need not be there."""
    answer_pattern: str = ""
    """Regular expression for the part of that column that is the answer: its last match, or that match's first group
    that took part. GSM8K: "#### (.+)"."""
    info_columns: list[str] = Field(default_factory=list)
    """Further columns that go along with a prompt. With `rewards`: all, unless some are named here."""

    @model_validator(mode="after")
    def _prompts_can_be_made(self) -> "DataSetTask":
        templates.variables(self.prompt_template)
        if self.prompt_template and not self._is_default("prompt_column"):
            raise ValueError("prompt_template takes the place of prompt_column: give one or the other")
        if self.held_out_split and self.held_out_split == self.split:
            raise ValueError(f"held_out_split and split are both {self.split!r}")
        return self

    @field_validator("answer_pattern")
    @classmethod
    def _is_an_expression(cls, pattern: str) -> str:
        answer_task.expression(pattern, "answer_pattern")
        return pattern

    @property
    def needs_answer(self) -> bool:
        """Whether a problem without an answer cannot be scored."""
        return True

    def check_problem(self, prompt: Prompt, *, where: str) -> None:
        """ConfigError for a problem that no response could be scored on."""

    def columns_for_rewards(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Columns that go along where info_columns names none."""
        return {}

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return self._splits[split]

    @cached_property
    def _splits(self) -> dict[Split, list[Prompt]]:
        train = list(self._read(self.split, "split"))
        if not self.held_out_split:
            return answer_task.split_by_prompt(train, self.held_out_fraction, where=f"task.path {self.path}")
        held_out = list(self._read(self.held_out_split, "held_out_split"))
        known = {each.content for each in held_out}
        kept = [each for each in train if each.content not in known]
        if len(kept) < len(train):
            log.warning(
                "%s: %d prompts of split %s are in %s, too, and are not trained on",
                self.path, len(train) - len(kept), self.split, self.held_out_split,
            )  # fmt: skip
        return {"train": kept, "held_out": held_out}

    def _read(self, split: str, key: str) -> Iterator[Prompt]:
        rows = load_rows(self.path, self.config, self.revision, split, key=key)
        where = f"{self.path}, split {split}"
        if not len(rows):
            raise ConfigError("no problem in it", where=where, fix=f"mend the data set, or task.{key}")
        has_answer = self._check_columns(rows.column_names)
        for index, row in enumerate(rows):
            yield self._problem(row, f"{split}:{index}", f"{where}, row {index}", has_answer)

    def _check_columns(self, columns: Sequence[str]) -> bool:
        """ConfigError for a column that is not there. Returns whether there are answers."""
        wanted = {each: "info_columns" for each in self.info_columns}
        if self.prompt_template:
            wanted |= {each: "prompt_template" for each in templates.variables(self.prompt_template) - {ROW}}
        else:
            wanted[self.prompt_column] = "prompt_column"
        if self.needs_answer or not self._is_default("answer_column"):
            wanted[self.answer_column] = "answer_column"
        for name, key in wanted.items():
            if name not in columns:
                raise ConfigError(
                    f"the data set has no column {name!r}", where=f"task.{key}", fix=did_you_mean(name, columns)
                )
        return self.answer_column in columns

    def _is_default(self, name: str) -> bool:
        """By value: a resolved configuration holds all keys."""
        return bool(getattr(self, name) == type(self).model_fields[name].default)

    def _problem(self, row: dict[str, Any], identifier: str, where: str, has_answer: bool) -> Prompt:
        if self.prompt_template:
            name = "prompt_template"
            content: Any = templates.fill(self.prompt_template, {**row, ROW: row}, where=f"task.{name}, {where}")
        else:
            name = self.prompt_column
            content = row[name]
        columns = {each: row[each] for each in self.info_columns} or self.columns_for_rewards(row)
        prompt = Prompt(
            id=identifier, content=answer_task.content_of(content, name, where=where),
            answer=self._answer(row[self.answer_column], where) if has_answer else "",
            info=answer_task.info_of(columns, where=where),
        )  # fmt: skip
        self.check_problem(prompt, where=where)
        return prompt

    def _answer(self, value: Any, where: str) -> str:
        if value is None and not self.needs_answer:
            return ""
        text = answer_task.text_of(value, self.answer_column, where=where)
        if not self.answer_pattern:
            return text
        found = matching.last_match(re.compile(self.answer_pattern), text, whole=False)
        if not found or not found.strip():
            raise ConfigError(
                f"answer_pattern {self.answer_pattern!r} finds nothing in {text[-60:]!r}",
                where=where, fix="mend task.answer_pattern",
            )  # fmt: skip
        return found.strip()
