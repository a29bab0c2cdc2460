"""Messages that are almost groups: what fuzzing gives to whoever decodes them, and what may come of it.

`mutated` changes a group where its structure is known (fields, arrays, enums, maps) and then, sometimes, its bytes.
`decode_all` is every way into the log; it lets through what is not a refusal.
"""

from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

from protos.sapo.v1 import ingest_pb2, trajectory_pb2
from sapo_learner.errors import InvalidTrajectory, Mismatch
from services.wire import check_against_run, decode, encode, from_message
from services.wire_shape import parse_request
from tests.small_run import VOCABULARY, group, trajectory

NUMBERS = (0, 1, 2, 3, 127, 128, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
REALS = (0.0, -0.0, 1.0, -1.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "",
    "x",
    "x" * 70_000,
    "\0",
    "\n",
    "correct",
    "\N{ZERO WIDTH SPACE}",
    "00-" + "0" * 32 + "-" + "1" * 16 + "-01",
)
BYTES = (b"", b"\0", b"\1\2", b"\xff" * 4, b"\0" * 4096, b"\0\0\xc0\x7f", b"\0\0\x80\xff")
_VALUES: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.CPPTYPE_DOUBLE: REALS,
    FieldDescriptor.CPPTYPE_STRING: (*TEXTS, *BYTES),
    FieldDescriptor.CPPTYPE_ENUM: (0, 1, 2, 3, 4, 99, -1),
}


def seed(random: Random) -> trajectory_pb2.TrajectoryGroup:
    """A group that is in order."""
    lengths = [random.randint(1, 5) for _ in range(random.randint(1, 3))]
    responses = tuple(trajectory(np.arange(length, dtype=np.int32)) for length in lengths)
    return trajectory_pb2.TrajectoryGroup.FromString(encode(group(trajectories=responses)))


def mutated(message: trajectory_pb2.TrajectoryGroup, random: Random) -> bytes:
    for _ in range(random.randint(0, 3)):
        _change_field(message, random)
    data = bytearray(message.SerializeToString())
    for _ in range(random.choice((0, 0, 0, 1, 4))):
        _change_bytes(data, random)
    return bytes(data)


def _change_field(message: Any, random: Random) -> None:
    """Somewhere inside, as deep as chance goes: most fields are a response's."""
    fields = message.DESCRIPTOR.fields
    field = next(
        (each for each in fields if each.name == "trajectories" and random.random() < 0.5), random.choice(fields)
    )
    if random.random() < 0.1:
        message.ClearField(field.name)
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        getattr(message, field.name)[random.choice(TEXTS)] = random.choice(REALS)
    elif field.is_repeated:
        _change_repeated(getattr(message, field.name), random)
    elif field.message_type is not None:
        _change_field(getattr(message, field.name), random)
    else:
        with suppress(ValueError, TypeError):  # not every value fits every type
            setattr(message, field.name, random.choice(_VALUES.get(field.cpp_type, NUMBERS)))


def _change_repeated(values: Any, random: Random) -> None:
    """Of messages: one changed, gone, twice, or many empty ones."""
    way = random.random()
    if way < 0.1:
        for _ in range(random.choice((1, 300))):
            values.add()
    elif len(values) and way < 0.3:
        del values[random.randrange(len(values))]
    elif len(values) and way < 0.4:
        values.add().CopyFrom(random.choice(values))
    elif len(values):
        _change_field(random.choice(values), random)


def _change_bytes(data: bytearray, random: Random) -> None:
    at, other = random.randrange(len(data) + 1), random.randrange(len(data) + 1)
    piece = bytes(random.randrange(256) for _ in range(random.choice((1, 2, 9))))
    changes: tuple[Callable[[], None], ...] = (
        lambda: data.__setitem__(slice(at, at + len(piece)), piece),
        lambda: data.__setitem__(slice(at, at), piece),
        lambda: data.__delitem__(slice(min(at, other), max(at, other))),
        lambda: data.__setitem__(slice(at, at), data[min(at, other) : max(at, other)]),
        lambda: data.__setitem__(slice(at, at), b"\x7b" * 200),  # groups in groups, which nothing of ours has
    )
    random.choice(changes)()


def decode_all(data: bytes) -> bool:
    """As a log entry, and as a stream's request; whether it is a group. Raises what is neither our refusal nor
    protobuf's, and AssertionError when a group that was taken does not come back as it was."""
    taken = False
    with suppress(InvalidTrajectory, Mismatch):
        one = decode(data)
        assert encode(decode(again := encode(one))) == again
        taken = True
    wrapped = ingest_pb2.StreamTrajectoryGroupsRequest(group=trajectory_pb2.TrajectoryGroup())
    prefix = wrapped.SerializeToString()[:1] + varint(len(data))
    for request in (data, prefix + data):
        with suppress(InvalidTrajectory, DecodeError):
            check_against_run(from_message(parse_request(request).group), vocabulary=VOCABULARY, versions={0: 0})
    return taken


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
