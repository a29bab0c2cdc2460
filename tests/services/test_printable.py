"""What a worker says cannot steer the terminal of whoever asks for the status."""

import io

import pytest
from rich.console import Console

from services.printable import printable
from services.status_report import print_status


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("plain, ä, 你", "plain, ä, 你"),
        ("\x1b]0;pwn\x07", "\\x1b]0;pwn\\x07"), ("a\nb", "a\\nb"), ("\u202e", "\\u202e"),
        ({"\x1b": ["\r", {"x": "\t"}]}, {"\\x1b": ["\\r", {"x": "\\t"}]}), (3, 3), (None, None),
    ],
)  # fmt: skip
def test_control_characters_are_written_out_at_any_depth(said: object, written: object) -> None:
    assert printable(said) == written


def test_a_status_has_no_line_of_a_worker_s_own_making() -> None:
    worker = {"worker": "w\nstep 9999/3000 | all is well", "notes": ["\x1b[2Jnote\nforged"], "waiting_for": "\x1b[1m"}
    status = {"run": "demo", "state": "training", "step": 1, "steps": 2, "evaluations": [], "workers": [worker]}
    out = io.StringIO()
    print_status(Console(file=out, width=500), {**status, "workers": []})
    lines = len(out.getvalue().splitlines())
    out = io.StringIO()
    full = worker | dict.fromkeys(("version", "step", "rows", "tokens", "tokens_per_second", "age_seconds"), 0)
    print_status(Console(file=out, width=500), {**status, "workers": [full]})
    assert "\x1b" not in out.getvalue()
    assert len(out.getvalue().splitlines()) <= lines + 2
