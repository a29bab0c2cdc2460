from protos.sapo.v1 import trajectory_pb2 as _trajectory_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StreamTrajectoryGroupsRequest(_message.Message):
    __slots__ = ("hello", "group")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    group: _trajectory_pb2.TrajectoryGroup
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., group: _Optional[_Union[_trajectory_pb2.TrajectoryGroup, _Mapping]] = ...) -> None: ...

class StreamTrajectoryGroupsResponse(_message.Message):
    __slots__ = ("welcome", "ack", "credits")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    ack: Ack
    credits: Credits
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., credits: _Optional[_Union[Credits, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("worker", "tokenizer_digest", "model_digest", "schema_version")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    worker: str
    tokenizer_digest: str
    model_digest: str
    schema_version: int
    def __init__(self, worker: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ..., model_digest: _Optional[str] = ..., schema_version: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("run", "credits")
    RUN_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    run: str
    credits: int
    def __init__(self, run: _Optional[str] = ..., credits: _Optional[int] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("draw", "attempt", "status", "entry_id", "reason", "retry_after_ms")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATUS_UNSPECIFIED: _ClassVar[Ack.Status]
        STATUS_ACCEPTED: _ClassVar[Ack.Status]
        STATUS_DUPLICATE: _ClassVar[Ack.Status]
        STATUS_EXPIRED: _ClassVar[Ack.Status]
        STATUS_INVALID: _ClassVar[Ack.Status]
        STATUS_FULL: _ClassVar[Ack.Status]
        STATUS_NOT_READY: _ClassVar[Ack.Status]
    STATUS_UNSPECIFIED: Ack.Status
    STATUS_ACCEPTED: Ack.Status
    STATUS_DUPLICATE: Ack.Status
    STATUS_EXPIRED: Ack.Status
    STATUS_INVALID: Ack.Status
    STATUS_FULL: Ack.Status
    STATUS_NOT_READY: Ack.Status
    DRAW_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ENTRY_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    draw: int
    attempt: int
    status: Ack.Status
    entry_id: str
    reason: str
    retry_after_ms: int
    def __init__(self, draw: _Optional[int] = ..., attempt: _Optional[int] = ..., status: _Optional[_Union[Ack.Status, str]] = ..., entry_id: _Optional[str] = ..., reason: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class Credits(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...
