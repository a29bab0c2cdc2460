"""What every command has in common at the terminal: its exit codes, one line per error, and output that is not a lie.

Results go to standard output, everything else to standard error. Where no terminal is attached nothing is wrapped, cut
short, coloured or animated, whatever COLUMNS says.
"""

import errno
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console

from sapo_learner.errors import SapoError

UNBOUNDED_COLUMNS = 100_000
PIPED_HELP_COLUMNS = 120
INTERRUPTED, READER_GONE = 130, 141
_FIXES = {
    errno.ENOSPC: "make room on the disk", errno.EDQUOT: "make room in the quota", errno.EROFS: "choose another place",
    errno.EACCES: "get access", errno.EPERM: "get access", errno.EMFILE: "raise `ulimit -n`",
}  # fmt: skip
# typer brings click's exceptions along, but shows only the leaves: this is their common parent.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def exit_codes() -> list[tuple[int, str]]:
    """Every exit code with its meaning: those of the error tree, and the few that are no errors."""
    tree = [(each.exit_code, (each.__doc__ or "").strip()) for each in SapoError.__subclasses__()]
    return [
        (0, "done; or asked to stop and drained"),
        (
            SapoError.exit_code,
            "anything that has no code of its own; of `ledger` and `up`: the ledger does not balance",
        ),
        *sorted(tree),
        (INTERRUPTED, "interrupted by Ctrl-C"),
    ]


def exit_code_table() -> str:
    """For the end of --help; the mark keeps click from filling the lines."""
    return "\b\nExit codes:\n" + "\n".join(f"  {code:>3}  {meaning}" for code, meaning in exit_codes())


def console(*, stderr: bool = False) -> Console:
    """Without a terminal: so wide that nothing wraps, and plain even where FORCE_COLOR is set."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(
        stderr=stderr, force_terminal=terminal, width=None if terminal else UNBOUNDED_COLUMNS, highlight=False
    )


def print_json(data: Any) -> None:
    """One line of JSON on standard output; what is not a finite number is null, which every parser reads."""
    typer.echo(json.dumps(_finite(data), allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(each) for each in data] if isinstance(data, list | tuple) else data


def warn(text: str) -> None:
    typer.echo(f"sapo: {text}", err=True)


def run(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run a command line (None: this process's) and return its exit code; an error is one line on standard error."""
    command = typer.main.get_command(app)
    _whole_short_help(command)
    width: dict[str, Any] = {} if sys.stdout.isatty() else {"terminal_width": PIPED_HELP_COLUMNS}
    try:
        code = command.main(arguments, prog_name="sapo", standalone_mode=False, max_content_width=100, **width)
        sys.stdout.flush()  # a full disk shows here, not after the exit code is given
    except (Exception, KeyboardInterrupt) as error:
        return _failed(_first_leaf(error))
    return code if isinstance(code, int) else 0


def _failed(error: BaseException) -> int:
    if isinstance(error, SapoError):
        warn(str(error))
        return error.exit_code
    if isinstance(error, UsageError):
        return _misused(error)
    if isinstance(error, BrokenPipeError):  # `sapo ... | head`; as an error, because SIGPIPE would end services, too
        return READER_GONE
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        fix = _FIXES.get(error.errno or 0, "mend that")
        warn(f"{where}{error.strerror or error} ({fix}, then give the same command again)")
        return SapoError.exit_code
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        warn("interrupted")
        return INTERRUPTED
    if isinstance(error, MemoryError):
        warn("out of memory (free some, or give a smaller model, batch or sample count)")
        return SapoError.exit_code
    raise error


def _misused(error: Any) -> int:
    """Arguments that the command does not have; a command without any shows its help."""
    message = error.format_message()
    if "\n" in message.strip() and message.startswith("Usage:"):
        typer.echo(message, err=True)
    else:
        path = error.ctx.command_path if error.ctx else "sapo"
        warn(f"{' '.join(message.split()).rstrip('.')} (see `{path} --help`)")
    return int(error.exit_code)


def _first_leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _whole_short_help(command: Any) -> None:
    """Have the list of commands give each one's first paragraph, which click would cut to the terminal's width."""
    for each in getattr(command, "commands", {}).values():
        each.short_help = " ".join((each.help or "").split("\n\n")[0].split())
        _whole_short_help(each)
