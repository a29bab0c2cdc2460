"""Responses of a run that could not be scored: each such line of its record holds the sums so far."""

from collections import Counter
from typing import Any

from services.control_plane.record import Record
from services.runtime.api import Unscored

KIND = "unscored"


def add(record: Record, worker: str, news: Unscored) -> None:
    before = record.last(KIND) or {"reasons": {}}
    record.add(KIND, worker=worker, reasons=dict(Counter(before["reasons"]) + Counter(news.reasons)), last=news.last)


def said(line: dict[str, Any]) -> str:
    """The newest line for a person."""
    reasons, count = line["reasons"], sum(line["reasons"].values())
    counts = ", ".join(f"{reason} {reasons[reason]}" for reason in sorted(reasons, key=lambda each: -reasons[each]))
    return (
        f"{count} response{'s' * (count != 1)} could not be scored ({counts}); last: {line['last']}; "
        f"the log of {line['worker']} says more"
    )
