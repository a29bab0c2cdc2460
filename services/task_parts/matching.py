"""Whether a response says what the answer says: as text, as a number, where a pattern finds it, as mathematics."""

import logging
import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

from services.task_parts import extras

Match = Literal["exact", "number", "regex", "math"]
# Of "5-7" or "(a)-7" the minus is an operation: a sign does not stand behind a digit, a letter or a closing bracket.
_NUMBER = re.compile(r"(?:(?<![\w)\]}])[-+])?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?")
_BOX = re.compile(r"\\f?boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped one is no brace


def matches(match: Match, text: str, answer: str, pattern: str = "") -> bool:
    """exact: all of the text. number: its last one. regex: what `pattern` finds last. math: its last box."""
    if match == "exact":
        return text.strip() == answer.strip()
    if match == "number":
        return number(last_match(_NUMBER, text)) == number(answer)
    if match == "math":
        return same_mathematics(text, answer)
    found = last_match(re.compile(pattern), text)
    if found is None:
        return False
    value = number(answer)
    return found.strip() == answer.strip() or (value is not None and number(found) == value)


def last_match(pattern: re.Pattern[str], text: str, *, whole: bool = True) -> str | None:
    """Of the last match the first group that took part in it; where none did, all of it, or, without `whole`, None."""
    found = list(pattern.finditer(text))
    if not found:
        return None
    otherwise = found[-1].group() if whole or not pattern.groups else None
    return next((group for group in found[-1].groups() if group is not None), otherwise)


def number(text: str | None) -> float | None:
    """None where it is none, or not a finite one."""
    try:
        value = float((text or "").strip().replace(",", "").removeprefix("$"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def last_box(text: str) -> str | None:
    r"""What the last \boxed{} holds; None without one, or where its braces do not close."""
    starts = [each.end() for each in _BOX.finditer(text)]
    if not starts:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, starts[-1]):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[starts[-1] : brace.start()].strip()
    return None


def same_mathematics(text: str, answer: str, *, unboxed: bool = False) -> bool:
    """Whether a response's last box is equivalent to the answer. unboxed: without a box, what reads like the answer.

    May take for ever: the caller has the deadline (math-verify's own needs signals, hence the main thread).
    """
    boxed = last_box(text)
    if boxed is not None:
        found = _parse(_in_box(boxed))
    elif unboxed and not _BOX.search(text):
        found = _parse(text)
    else:
        return False
    same: bool = _verify()(_parsed_answer(answer), found, timeout_seconds=None)
    return same


def require_mathematics() -> None:
    """ConfigError without math-verify."""
    _library()


def is_mathematics(answer: str) -> bool:
    """Whether an answer can be compared with: math-verify makes an expression of it."""
    return any(not isinstance(each, str) for each in _parsed_answer(answer))


@lru_cache(maxsize=1024)  # of a group's responses each is held against the same one
def _parsed_answer(answer: str) -> Any:
    boxed = last_box(answer)
    return _parse(_in_box(answer if boxed is None else boxed))


def _in_box(content: str) -> str:
    return f"\\boxed{{{content.strip().strip('$')}}}" if content.strip().strip("$") else ""


def _parse(text: str) -> Any:
    return _library().parse(text, parsing_timeout=None)


def _verify() -> Callable[..., Any]:
    verify: Callable[..., Any] = _library().verify
    return verify


@lru_cache(maxsize=1)
def _library() -> Any:
    library = extras.load("math_verify")
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns at every call that its deadline is off
    return library
