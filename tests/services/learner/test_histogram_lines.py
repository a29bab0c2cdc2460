"""Histograms in the record: in a step's line, at most one a second."""

import numpy as np

from services.learner import step_record
from services.learner.step_record import Histograms


class Figures:
    """As of a step with tokens, or without."""

    def __init__(self, *tokens: float) -> None:
        self._tokens = np.array(tokens)

    def histograms(self) -> dict[str, object]:
        return {"edges": []} if len(self._tokens) else {}


def test_one_a_second_and_a_step_without_tokens_takes_no_turn(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    now = [100.0]
    monkeypatch.setattr(step_record.time, "monotonic", lambda: now[0])
    lines = Histograms()
    some, none = Figures(1.0), Figures()
    found = []
    for seconds, figures in ((0.0, none), (0.1, some), (0.5, some), (1.2, some), (1.3, some)):
        now[0] = 100.0 + seconds
        found.append(bool(lines.of(figures)))  # type: ignore[arg-type]
    assert found == [False, True, False, True, False]
