"""Whatever bytes come, decoding them refuses or takes them: no other error, no hang, no memory beyond the message's."""

from random import Random
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protos.sapo.v1 import ingest_pb2, trajectory_pb2
from sapo_learner.errors import InvalidTrajectory
from services.wire_shape import MAX_PARTS, check_parts, parse_request
from tests.mutated_groups import decode_all, mutated, seed, varint

RANDOMS = st.integers(0, 2**32).map(Random)
GROUP = trajectory_pb2.TrajectoryGroup.DESCRIPTOR


@settings(max_examples=500, deadline=None)
@given(random=RANDOMS)
def test_a_changed_group_is_refused_or_taken(random: Random) -> None:
    decode_all(mutated(seed(random), random))


@settings(max_examples=500, deadline=None)
@given(data=st.binary(max_size=200))
@example(data=b"\x7b" * 10_000)
@example(data=b"\x0a" * 10_000)
@example(data=b"\x4a\xff\xff\xff\xff\x0f")  # a response of four gigabytes, it says
def test_so_are_any_bytes(data: bytes) -> None:
    decode_all(data)


def test_the_changes_reach_both_ends() -> None:
    """Of what is drawn some is taken and some refused: nothing is tested by a fuzzer that only draws one of them."""
    randoms = [Random(number) for number in range(300)]
    taken = sum(decode_all(mutated(seed(random), random)) for random in randoms)
    assert 30 < taken < 270


# ---- parts are counted before they are made

BOMBS = {
    "responses": b"\x4a\x00" * MAX_PARTS,
    "spans": b"\x4a" + varint(2 * MAX_PARTS) + b"\x22\x00" * MAX_PARTS,
    "rewards": b"\x4a" + varint(2 * MAX_PARTS) + b"\x2a\x00" * MAX_PARTS,
    "numbers": b"\x08\x01" * MAX_PARTS,
    "behind a group": b"\x7b\x7c" + b"\x4a\x00" * MAX_PARTS,
    "in a group": b"\x7b" + b"\x4a\x00" * MAX_PARTS + b"\x7c",
    "behind unknown fields": b"\x79" + b"\0" * 8 + b"\x7d" + b"\0" * 4 + b"\x7a\x03abc" + b"\x4a\x00" * MAX_PARTS,
    "with long tags": b"\xca\x00\x00" * MAX_PARTS,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_message_of_very_many_parts_is_refused_before_it_is_decoded(
    bomb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"\x12" + varint(len(BOMBS[bomb])) + BOMBS[bomb]
    with pytest.raises(InvalidTrajectory, match=f"more than {MAX_PARTS} parts"):
        parse_request(data)
    check_parts(data, ingest_pb2.StreamTrajectoryGroupsRequest.DESCRIPTOR, most=2 * MAX_PARTS)


@settings(max_examples=300, deadline=None)
@given(random=RANDOMS)
def test_counting_sees_as_many_parts_as_protobuf_makes(random: Random) -> None:
    data = mutated(seed(random), random)
    try:
        parts = _parts(trajectory_pb2.TrajectoryGroup.FromString(data))
    except DecodeError:
        return
    if parts:
        with pytest.raises(InvalidTrajectory):
            check_parts(data, GROUP, most=parts - 1)


def _parts(message: Any) -> int:
    """Messages inside this one, however deep; what is there twice counts once, as it does in memory."""
    count = 0
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            count += len(value)
        else:
            inside = value if field.is_repeated else [value]
            count += sum(1 + _parts(each) for each in inside)
    return count
