"""How many parts a message has, before it is decoded.

A message inside another takes two bytes on the wire and seventy in memory, and more as an object of ours: 64 MiB of
them would become gigabytes. So the bytes are walked first, which costs 35 us a response (arrays are stepped over), and
what has more parts than any group needs is refused. What is malformed in another way is left to the decoder.
"""

from typing import Any

from protos.sapo.v1 import ingest_pb2
from sapo_learner.errors import InvalidTrajectory

MAX_PARTS = 1 << 17
_VARINT, _FIXED64, _BYTES, _GROUP, _END_GROUP, _FIXED32 = range(6)
_WIDTH = {_FIXED64: 8, _GROUP: 0, _END_GROUP: 0, _FIXED32: 4}  # a group's fields are counted as if they were ours


def parse_request(data: bytes) -> ingest_pb2.StreamTrajectoryGroupsRequest:
    """Raises InvalidTrajectory for too many parts, DecodeError for what is no message."""
    check_parts(data, ingest_pb2.StreamTrajectoryGroupsRequest.DESCRIPTOR)
    return ingest_pb2.StreamTrajectoryGroupsRequest.FromString(data)


def check_parts(data: bytes, descriptor: Any, most: int = MAX_PARTS) -> None:
    """Raises InvalidTrajectory when a message of that type would have more than `most` fields, all depths together."""
    waiting, parts = [(0, len(data), descriptor)], 0
    while waiting:
        at, end, kind = waiting.pop()
        while at < end:
            parts += 1
            if parts > most:
                raise InvalidTrajectory(
                    f"a message of more than {most} parts", fix="lower sampling.group_size, or run worker and ingest "
                    "at the same version",
                )  # fmt: skip
            tag, at = _varint(data, at, end)
            length, start = _length(data, tag & 7, at, end)
            field = kind.fields_by_number.get(tag >> 3)
            if tag & 7 == _BYTES and field is not None and field.message_type is not None:
                waiting.append((start, min(start + length, end), field.message_type))
            at = start + length


def _length(data: bytes, wire_type: int, at: int, end: int) -> tuple[int, int]:
    """Of a field's content: bytes, and where they begin. All the rest where no field is: the decoder ends there."""
    if wire_type == _VARINT:
        return 0, _varint(data, at, end)[1]
    if wire_type == _BYTES:
        return _varint(data, at, end)
    return _WIDTH.get(wire_type, end - at), at


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    return value, at
