"""Trace ids as W3C Trace Context writes them."""

from services.runtime import tracing
from services.runtime.tracing import new_traceparent, trace_id, valid


def test_every_trace_is_another_one_and_well_formed() -> None:
    made = {new_traceparent() for _ in range(1000)}
    assert len({trace_id(each) for each in made}) == 1000
    assert all(map(valid, made))
    assert {len(trace_id(each)) for each in made} == {32}


def test_ids_are_never_all_zero(monkeypatch) -> None:
    monkeypatch.setattr(tracing.secrets, "token_hex", lambda count: "00" * count)
    assert all(valid(new_traceparent()) for _ in range(1000))


def test_what_is_malformed_has_no_id() -> None:
    assert trace_id("00-" + "0" * 32 + "-00f067aa0ba902b7-01") == ""
    assert trace_id("") == ""
