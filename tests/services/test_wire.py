"""The wire: what goes in comes out bit for bit, and every malformed message is one error that names field and draw."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.sapo.v1 import trajectory_pb2 as pb
from sapo_learner.errors import InvalidTrajectory, Mismatch
from sapo_learner.trajectory import SamplingParameters, Trajectory, TrajectoryGroup, VersionSpan
from services.runtime.tracing import new_traceparent
from services.wire import MAX_MESSAGE_BYTES, check_against_run, decode, encode, from_message, to_message
from tests.small_run import group, trajectory

REWARD_NAMES = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3, unique=True)
FINITE = st.floats(-1e300, 1e300)  # three of which sum to a number
VERSIONS = st.integers(0, 2**63 - 1)


@st.composite
def trajectories(draw: st.DrawFn, names: list[str]) -> Trajectory:
    count = draw(st.integers(1, 20))
    cuts = sorted(draw(st.sets(st.integers(1, count), max_size=3)) | {count})
    lengths = np.diff([0, *cuts]).tolist()
    logprobs = st.floats(max_value=0, min_value=-(2.0**100), width=32)
    return Trajectory(
        token_ids=np.array(draw(st.lists(st.integers(0, 2**31 - 1), min_size=count, max_size=count)), np.int32),
        behaviour_logprobs=np.array(draw(st.lists(logprobs, min_size=count, max_size=count)), np.float32),
        loss_mask=np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), np.bool_),
        spans=tuple(VersionSpan(length, draw(VERSIONS), draw(VERSIONS)) for length in lengths),
        rewards={name: draw(FINITE) for name in names},
        finish_reason=draw(st.sampled_from(["stop", "length"])),
    )


@st.composite
def groups(draw: st.DrawFn) -> TrajectoryGroup:
    names = draw(REWARD_NAMES)
    prompt = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=10))
    mode = draw(st.sampled_from(["processed", "raw"]))
    temperature = 1.0 if mode == "raw" else draw(st.floats(1e-3, 1e3))
    return TrajectoryGroup(
        draw=draw(st.integers(0, 2**63 - 1)),
        attempt=draw(st.integers(1, 2**32 - 1)),
        task=draw(st.text(max_size=8)),
        prompt_id=draw(st.text(max_size=8)),
        epoch=draw(st.integers(0, 2**32 - 1)),
        seed=draw(st.integers(0, 2**63 - 1)),
        prompt_ids=np.array(prompt, np.int32),
        trajectories=tuple(draw(st.lists(trajectories(names), min_size=1, max_size=3))),
        sampling=SamplingParameters(temperature, draw(st.integers(1, 2**32 - 1)), logprob_mode=mode),
        engine=draw(st.text(max_size=8)),
        worker=draw(st.text(max_size=8)),
        traceparent=draw(st.sampled_from(["", new_traceparent()])),
    )


def assert_same(one: TrajectoryGroup, other: TrajectoryGroup) -> None:
    plain = [name for name in one.__slots__ if name not in ("prompt_ids", "trajectories")]
    assert [getattr(one, name) for name in plain] == [getattr(other, name) for name in plain]
    same_array(one.prompt_ids, other.prompt_ids)
    assert len(one.trajectories) == len(other.trajectories)
    for left, right in zip(one.trajectories, other.trajectories, strict=True):
        for name in ("token_ids", "behaviour_logprobs", "loss_mask"):
            same_array(getattr(left, name), getattr(right, name))
        for name in ("spans", "rewards", "finish_reason"):
            assert getattr(left, name) == getattr(right, name)


def same_array(left: Any, right: Any) -> None:
    assert left.dtype == right.dtype
    assert left.tobytes() == right.tobytes()


@given(groups())
@settings(max_examples=60, deadline=None)
def test_a_group_survives_the_wire_bit_for_bit(original: TrajectoryGroup) -> None:
    assert_same(decode(encode(original)), original)


@given(groups())
@settings(max_examples=20, deadline=None)
def test_equal_groups_have_equal_bytes_because_the_log_is_hashed(original: TrajectoryGroup) -> None:
    assert encode(decode(encode(original))) == encode(original)


def test_arrays_travel_little_endian() -> None:
    message = to_message(group(prompt_ids=np.array([1, 256], np.int32)))
    assert message.prompt_ids.data == b"\x01\x00\x00\x00\x00\x01\x00\x00"
    first = message.trajectories[0]
    assert first.behaviour_logprobs.data == np.full(2, -1.5, "<f4").tobytes()
    assert first.loss_mask.data == b"\x01\x01"
    assert [first.token_ids.dtype, first.behaviour_logprobs.dtype, first.loss_mask.dtype] == [
        pb.DTYPE_INT32,
        pb.DTYPE_FLOAT32,
        pb.DTYPE_BOOL,
    ]


TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_the_trace_travels_and_a_group_of_a_peer_that_knows_none_has_none() -> None:
    assert decode(encode(group(traceparent=TRACE))).traceparent == TRACE
    message = to_message(group(traceparent=TRACE))
    message.ClearField("traceparent")
    assert message.SerializeToString(deterministic=True) == encode(group()), "as groups were before there were traces"
    assert from_message(message).traceparent == ""


@pytest.mark.parametrize(
    "malformed",
    [
        "x", TRACE[:-1], TRACE + "0", TRACE + "\n", TRACE.upper(), TRACE.replace("4b", "4g"), "ff" + TRACE[2:],
        f"00-{'0' * 32}-00f067aa0ba902b7-01", f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01", "\0" * 55,
        TRACE * 100_000,
    ],
)  # fmt: skip
def test_no_group_is_refused_for_a_trace_that_is_malformed(malformed: str) -> None:
    message = to_message(group())
    message.traceparent = malformed
    assert from_message(message).traceparent == ""
    assert decode(message.SerializeToString()).traceparent == ""


def test_what_was_decoded_cannot_be_changed() -> None:
    decoded = decode(encode(group()))
    with pytest.raises(ValueError, match="read-only"):
        decoded.trajectories[0].token_ids[0] = 1


Change = Callable[[pb.TrajectoryGroup], object]


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def ints(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def set_data(path: str, data: bytes, length: int | None = None) -> Change:
    def change(message: pb.TrajectoryGroup) -> None:
        array = message.prompt_ids if path == "prompt_ids" else getattr(message.trajectories[1], path)
        array.data = data
        array.length = len(data) // 4 if length is None else length

    return change


def assign(**fields: Any) -> Change:
    return lambda message: [setattr(message, name, value) for name, value in fields.items()] and None


def first(**fields: Any) -> Change:
    return lambda message: [setattr(message.trajectories[0], name, value) for name, value in fields.items()] and None


def sampling(**fields: Any) -> Change:
    return lambda message: [setattr(message.sampling, name, value) for name, value in fields.items()] and None


MALFORMED: dict[str, tuple[Change, str]] = {
    "schema version": (assign(schema_version=0), "schema version 0, this sapo reads 1"),
    "attempt 0": (assign(attempt=0), "attempt"),
    "draw beyond 63 bits": (assign(draw=2**63), "draw 9223372036854775808: draw or attempt out of range"),
    "seed beyond 63 bits": (assign(seed=2**63), "seed out of range"),
    "no prompt": (lambda m: m.ClearField("prompt_ids"), "prompt_ids has dtype DTYPE_UNSPECIFIED, expected DTYPE_INT32"),
    "empty prompt": (set_data("prompt_ids", b""), "prompt has no token"),
    "negative prompt token": (
        set_data("prompt_ids", ints(-1)),
        "draw 41, prompt, token 0: prompt token id -1 is negative",
    ),
    "torn prompt": (set_data("prompt_ids", b"\0\0\0", 1), "prompt_ids states 1 elements of 4 bytes but holds 3"),
    "no response": (lambda m: m.ClearField("trajectories"), "no response"),
    "no tokens": (set_data("token_ids", b""), "response 1: a response has no token"),
    "wrong length": (set_data("token_ids", ints(1), 2), "response 1: token_ids states 2 elements"),
    "huge length": (set_data("token_ids", ints(1), 2**32 - 1), "response 1: token_ids states 4294967295"),
    "negative token": (set_data("token_ids", ints(-5)), "draw 41, response 1, token 0: token id -5 is negative"),
    "float ids": (
        lambda m: setattr(m.trajectories[1].token_ids, "dtype", pb.DTYPE_FLOAT32),
        "response 1: token_ids has dtype DTYPE_FLOAT32, expected DTYPE_INT32",
    ),
    "unknown layout": (lambda m: setattr(m.trajectories[1].token_ids, "dtype", 77), "token_ids has dtype unknown (77)"),
    "int log-probs": (
        lambda m: setattr(m.trajectories[1].behaviour_logprobs, "dtype", pb.DTYPE_INT32),
        "behaviour_logprobs has dtype DTYPE_INT32, expected DTYPE_FLOAT32",
    ),
    "log-prob missing": (set_data("behaviour_logprobs", b""), "behaviour_logprobs has shape (0,)"),
    "log-prob NaN": (
        set_data("behaviour_logprobs", floats(np.nan)),
        "response 1, token 0: behaviour log-prob nan is not finite",
    ),
    "log-prob infinite": (set_data("behaviour_logprobs", floats(-np.inf)), "log-prob -inf is not finite"),
    "log-prob positive": (
        set_data("behaviour_logprobs", floats(0.5)),
        "response 1, token 0: behaviour log-prob 0.5 is above 0",
    ),
    "mask byte 2": (set_data("loss_mask", b"\2", 1), "loss_mask holds a byte that is neither 0 nor 1"),
    "mask byte 255": (set_data("loss_mask", b"\xff", 1), "loss_mask holds a byte that is neither 0 nor 1"),
    "mask too long": (set_data("loss_mask", b"\1\1", 2), "loss_mask has shape (2,)"),
    "no span": (lambda m: m.trajectories[1].ClearField("spans"), "spans cover 0 tokens of 1"),
    "short span": (lambda m: setattr(m.trajectories[0].spans[0], "length", 1), "spans cover 1 tokens of 2"),
    "empty span": (lambda m: m.trajectories[0].spans.add(length=0), "response 0, token 2: a version span is empty"),
    "no reward": (lambda m: m.trajectories[0].ClearField("rewards"), "no reward"),
    "reward NaN": (lambda m: m.trajectories[0].rewards.update({"correct": float("nan")}), "reward is not finite"),
    "other reward": (lambda m: m.trajectories[0].rewards.update({"style": 1.0}), "different reward components"),
    "finish reason": (first(finish_reason=pb.FINISH_REASON_UNSPECIFIED), "finish reason"),
    "future finish reason": (first(finish_reason=99), "finish reason"),
    "temperature 0": (sampling(temperature=0), "temperature"),
    "temperature NaN": (sampling(temperature=float("nan")), "temperature"),
    "top_p": (sampling(top_p=0.9), "top_p 0.9"),
    "top_k": (sampling(top_k=50), "top_k 50"),
    "max_tokens": (sampling(max_tokens=0), "max_tokens"),
    "mode": (sampling(logprob_mode=pb.LOGPROB_MODE_UNSPECIFIED), "log-prob mode"),
    "raw at temperature": (sampling(logprob_mode=pb.LOGPROB_MODE_RAW, temperature=0.5), "raw log-probs"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_field_is_one_error_that_names_it_and_the_draw(name: str) -> None:
    change, expected = MALFORMED[name]
    message = to_message(group(draw=41))
    change(message)
    with pytest.raises(InvalidTrajectory) as caught:
        from_message(message)
    assert expected in str(caught.value)
    assert caught.value.where.startswith(f"draw {message.draw}")
    assert caught.value.fix or "use top_p 1" in caught.value.what
    with pytest.raises(InvalidTrajectory):
        decode(message.SerializeToString())


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_bytes_that_are_no_group_are_an_invalid_trajectory(data: bytes) -> None:
    with pytest.raises(InvalidTrajectory):
        decode(data)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_flipped_byte_is_refused_or_still_a_group(data: st.DataObject) -> None:
    payload = bytearray(encode(group()))
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode(bytes(payload))
    except (InvalidTrajectory, Mismatch):  # the latter for its schema version
        return
    assert isinstance(decoded, TrajectoryGroup)


def test_a_group_beyond_one_message_is_refused_at_the_sender() -> None:
    count = MAX_MESSAGE_BYTES // 9
    big = trajectory(np.zeros(count, np.int32))
    assert len(encode(group(trajectories=(trajectory(np.zeros(count // 2, np.int32)),)))) < MAX_MESSAGE_BYTES
    with pytest.raises(InvalidTrajectory, match=r"draw 8: \d+ bytes exceed .*sampling.group_size"):
        encode(group(draw=8, trajectories=(big, big)))


def test_the_largest_message_that_the_sender_lets_pass_fits_with_its_envelope() -> None:
    from protos.sapo.v1 import ingest_pb2

    count = (MAX_MESSAGE_BYTES - 400) // 9
    message = to_message(group(trajectories=(trajectory(np.zeros(count, np.int32)),)))
    request = ingest_pb2.StreamTrajectoryGroupsRequest(group=message)
    assert MAX_MESSAGE_BYTES - 600 < request.ByteSize() <= MAX_MESSAGE_BYTES


def test_ids_outside_the_vocabulary_are_refused_in_prompt_and_responses() -> None:
    known = {0: 0}
    check_against_run(group(), vocabulary=8, versions=known)
    with pytest.raises(
        InvalidTrajectory, match="draw 0, response 1, token 0: token id 7 is outside the vocabulary of 7"
    ):
        check_against_run(group(), vocabulary=7, versions=known)
    with pytest.raises(InvalidTrajectory, match="draw 0, prompt, token 1: token id 5"):
        check_against_run(group(trajectories=(trajectory((1,)),)), vocabulary=5, versions=known)


def test_an_unknown_version_or_one_of_another_step_is_refused() -> None:
    mixed = trajectory((5, 6), spans=(VersionSpan(1, 3, 30), VersionSpan(1, 4, 40)))
    both = group(trajectories=(trajectory((1,), version=3, spans=(VersionSpan(1, 3, 30),)), mixed))
    check_against_run(both, vocabulary=20, versions={3: 30, 4: 40})
    with pytest.raises(
        InvalidTrajectory, match="draw 0, response 1, token 1: policy version 4 is not one of the run's"
    ):
        check_against_run(both, vocabulary=20, versions={3: 30})
    with pytest.raises(InvalidTrajectory, match="policy version 4 comes from step 41, not 40"):
        check_against_run(both, vocabulary=20, versions={3: 30, 4: 41})


def test_reward_components_whose_sum_overflows_are_refused() -> None:
    """Each is finite, the reward is not: it would poison the group's advantages."""
    with pytest.raises(InvalidTrajectory, match="sum of the reward components"):
        trajectory(rewards={"a": 1.7e308, "b": 1.7e308})


def test_what_is_not_one_number_per_token_in_its_dtype_is_refused() -> None:
    with pytest.raises(InvalidTrajectory, match="behaviour_logprobs is float64, expected float32"):
        trajectory((5, 6), behaviour_logprobs=np.full(2, -1.5))
    with pytest.raises(InvalidTrajectory, match=r"loss_mask has shape \(2, 1\), expected \(2,\)"):
        trajectory((5, 6), loss_mask=np.ones((2, 1), np.bool_))
