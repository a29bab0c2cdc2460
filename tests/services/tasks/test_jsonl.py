"""Task `jsonl`: matching, splitting, and one clear error with file and line for what is wrong with a file."""

import json
from pathlib import Path

import pytest

from sapo_learner.errors import ConfigError
from services.tasks import Prompt, Response, TaskSettings, build


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def rows(count: int) -> list[object]:
    return [{"prompt": f"{n} + 1 =", "answer": n + 1} for n in range(count)]


def task(path: Path, **options: object):
    return build(TaskSettings(name="jsonl", path=str(path), **options))


@pytest.mark.parametrize(
    ("options", "answer", "text", "correct"),
    [
        ({}, "12", " 12\n", True),
        ({}, "12", "it is 12", False),
        ({"match": "number"}, "1234", "so 5 and then 1,234.0.", True),
        ({"match": "number"}, "-0.5", "x = -.5", True),
        ({"match": "number"}, "7", "5-7", True),
        ({"match": "number"}, "-7", "5-7", False),
        ({"match": "number"}, "7", "(a)-7", True),
        ({"match": "number"}, "7", "x+y-7", True),
        ({"match": "number"}, "-7", "x=-7", True),
        ({"match": "number"}, "-7", "5 - 12 = -7", True),
        ({"match": "number"}, "-7", "(-7)", True),
        ({"match": "number"}, "0.007", "7e-3", True),
        ({"match": "number"}, "12", "12 or 13", False),
        ({"match": "number"}, "12", "none", False),
        ({"match": "regex", "pattern": r"\\boxed\{(.*?)\}"}, "x+1", r"\boxed{2} \boxed{x+1}", True),
        ({"match": "regex", "pattern": r"answer: (\S+)"}, "12", "answer: 12.0", True),
        ({"match": "regex", "pattern": r"answer: (\S+)"}, "12", "12", False),
        ({"match": "regex", "pattern": r"\d+"}, "12", "a 12 b", True),
        ({"match": "regex", "pattern": r"answer: (\w+)|box: (\w+)"}, "12", "answer: 3, box: 12", True),
        ({"match": "regex", "pattern": r"answer: (\w+)|box: (\w+)"}, "12", "box: 3, answer: 12", True),
        ({"match": "regex", "pattern": r"(no )?answer"}, "answer", "the answer", True),
        ({"match": "regex", "pattern": r"answer:(.*)"}, "answer:", "answer:", False),
    ],
)
def test_matching(tmp_path: Path, options: dict[str, str], answer: str, text: str, correct: bool) -> None:
    built = task(write(tmp_path / "p.jsonl", *rows(50)), **options)
    assert built.score(Prompt(id="1", content="p", answer=answer), Response(text, "stop")) == {
        "correct": float(correct)
    }


def test_the_split_is_by_prompt_and_does_not_depend_on_the_order(tmp_path: Path) -> None:
    built = task(write(tmp_path / "p.jsonl", *rows(500)))
    train = {each.text for each in built.prompts("train")}
    held_out = {each.text for each in built.prompts("held_out")}
    assert not train & held_out
    assert len(train | held_out) == 500
    assert 25 <= len(held_out) <= 75
    again = task(write(tmp_path / "q.jsonl", *reversed(rows(500))))
    assert {each.text for each in again.prompts("held_out")} == held_out


def test_held_out_problems_may_come_from_a_file_of_their_own(tmp_path: Path) -> None:
    held_out = write(tmp_path / "h.jsonl", *rows(3))
    built = task(write(tmp_path / "p.jsonl", *rows(20)), held_out_path=str(held_out))
    assert len(built.prompts("train")) == 20
    assert [problem.id for problem in built.prompts("held_out")] == ["h.jsonl:1", "h.jsonl:2", "h.jsonl:3"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "a", "answer": ', r"p\.jsonl:3: not JSON"),
        ("[1, 2]", r"p\.jsonl:3: not a JSON object"),
        ({"prompt": "a"}, r"p\.jsonl:3: no field 'answer'"),
        ({"promt": "a", "answer": "b"}, r"no field 'prompt' \(did you mean 'promt'"),
        ({"prompt": "a", "answer": None}, r"p\.jsonl:3: 'answer' is None"),
        ({"prompt": "", "answer": "b"}, r"p\.jsonl:3: 'prompt' is ''"),
    ],
)
def test_a_broken_line_is_named_by_file_and_line(tmp_path: Path, line: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        task(write(tmp_path / "p.jsonl", rows(1)[0], "", line)).prompts("train")


def test_mistakes_in_the_settings_say_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *rows(50))
    with pytest.raises(ConfigError, match="belong together"):
        task(path, match="regex")
    with pytest.raises(ConfigError, match="no regular expression"):
        task(path, match="regex", pattern="(")
    with pytest.raises(ConfigError, match="did you mean 'path'"):
        build(TaskSettings(name="jsonl", paht=str(path)))
    with pytest.raises(ConfigError, match="not readable"):
        task(tmp_path / "none.jsonl").prompts("train")
    with pytest.raises(ConfigError, match="all 1 problems are held out, none is left to train on"):
        task(write(tmp_path / "one.jsonl", {"prompt": "a", "answer": "b"}), held_out_fraction=1 - 1e-9).prompts("train")
    with pytest.raises(ConfigError, match="no problem in the file"):
        task(write(tmp_path / "empty.jsonl")).prompts("train")
    with pytest.raises(ConfigError, match=r"task\.held_out_path .*empty\.jsonl: no problem in the file"):
        task(path, held_out_path=str(tmp_path / "empty.jsonl")).prompts("train")
    with pytest.raises(ConfigError, match="is not a number"):
        task(write(tmp_path / "w.jsonl", {"prompt": "a", "answer": "b"}), match="number").prompts("train")
    with pytest.raises(ConfigError, match="is not a number"):  # what json.dumps writes for a value that is missing
        task(write(tmp_path / "nan.jsonl", {"prompt": "a", "answer": float("nan")}), match="number").prompts("train")


def test_a_file_too_small_to_hold_anything_out_is_no_mistake(tmp_path: Path) -> None:
    built = task(write(tmp_path / "one.jsonl", {"prompt": "a", "answer": "b"}), held_out_fraction=1e-9)
    assert [len(built.prompts("train")), len(built.prompts("held_out"))] == [1, 0]


def test_only_a_newline_ends_a_line_and_a_byte_order_mark_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + '{"prompt": "a\u2028b\x85c", "answer": "1"}\r\n{"prompt": "d", "answer": "2"}'.encode()
    )
    problems = task(path, held_out_fraction=1e-9).prompts("train")
    assert [(each.id, each.text) for each in problems] == [("p.jsonl:1", "a\u2028b\x85c"), ("p.jsonl:2", "d")]
