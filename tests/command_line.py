"""`sapo` as a user runs it, but in this process: argv in, exit code, standard output and standard error out."""

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from services import terminal
from services.cli import app


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def sapo(*arguments: object) -> Outcome:
    """Run `sapo ARGUMENTS...` without a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _logging_to(err):
        code = terminal.run(app, [str(each) for each in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _logging_to(stream: io.StringIO) -> Iterator[None]:
    """As `main` sets it up; `sapo serve` replaces the handlers, which are put back afterwards."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers = [logging.StreamHandler(stream)]
    try:
        yield
    finally:
        root.handlers = before
        root.setLevel(level)
