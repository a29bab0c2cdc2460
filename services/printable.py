"""What others have said, as it may go to a terminal: nothing of it steers the terminal or begins a line of its own."""

from typing import Any


def printable(value: Any) -> Any:
    """Every text in it with control characters written out; everything else as it is."""
    if isinstance(value, str):
        return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in value)
    if isinstance(value, dict):
        return {printable(key): printable(each) for key, each in value.items()}
    return [printable(each) for each in value] if isinstance(value, list) else value
