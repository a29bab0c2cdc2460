"""proto <-> TrajectoryGroup: the only converter.

Arrays travel as little-endian bytes with dtype and length stated (protos/sapo/v1/trajectory.proto). Decoding checks
the layout here and everything else in the constructors of sapo_learner.trajectory; a bad message raises
InvalidTrajectory that names the field. A malformed traceparent is none: no group is lost for it. What depends on the
run (vocabulary, known versions) is `check_against_run`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from protos.sapo.v1 import trajectory_pb2 as pb
from sapo_learner import formats
from sapo_learner.errors import InvalidTrajectory
from sapo_learner.trajectory import SamplingParameters, Trajectory, TrajectoryGroup, VersionSpan
from services.runtime.tracing import valid

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
TOKEN_BYTES = 4 + 4 + 1  # id, log-prob, mask
ENVELOPE_BYTES = 64  # what the stream's request adds around a group
TOO_LARGE = "lower sampling.max_tokens or sampling.group_size"
_SAME_VERSION = "run worker and ingest at the same version"
_SAMPLE_AGAIN = "the worker must sample under versions that the control plane lists, and report their steps"

_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_BOOL: np.dtype("?"),
}
_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
_MODES = {"processed": pb.LOGPROB_MODE_PROCESSED, "raw": pb.LOGPROB_MODE_RAW}
_FINISH_NAMES: dict[int, Any] = {value: name for name, value in _FINISH.items()}
_MODE_NAMES: dict[int, Any] = {value: name for name, value in _MODES.items()}


def to_message(group: TrajectoryGroup, *, max_bytes: int = MAX_MESSAGE_BYTES) -> pb.TrajectoryGroup:
    """The group as it travels; raises InvalidTrajectory when it would exceed one message of `max_bytes`."""
    message = pb.TrajectoryGroup(
        schema_version=group.schema_version,
        draw=group.draw,
        attempt=group.attempt,
        task=group.task,
        prompt_id=group.prompt_id,
        epoch=group.epoch,
        seed=group.seed,
        prompt_ids=_array(group.prompt_ids, pb.DTYPE_INT32),
        trajectories=[_encode_trajectory(trajectory) for trajectory in group.trajectories],
        sampling=pb.SamplingParameters(
            temperature=group.sampling.temperature,
            top_p=group.sampling.top_p,
            top_k=group.sampling.top_k,
            max_tokens=group.sampling.max_tokens,
            logprob_mode=_MODES[group.sampling.logprob_mode],
        ),
        engine=group.engine,
        worker=group.worker,
        traceparent=group.traceparent,
    )
    size = message.ByteSize()
    if size > max_bytes - ENVELOPE_BYTES:
        raise InvalidTrajectory(
            f"{size} bytes exceed the {max_bytes} of one message",
            where=f"draw {group.draw}",
            fix=TOO_LARGE,
        )
    return message


def encode(group: TrajectoryGroup) -> bytes:
    """The bytes of a log entry; raises InvalidTrajectory as `to_message` does."""
    return to_message(group).SerializeToString(deterministic=True)


def decode(data: bytes) -> TrajectoryGroup:
    """Parse and validate the bytes of a log entry; raises InvalidTrajectory, and Mismatch for one of a schema version
    that is not read here: a newer ingest has taken it, so it is not the entry that is wrong."""
    message = pb.TrajectoryGroup()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise InvalidTrajectory(f"not a TrajectoryGroup: {error}", fix=_SAME_VERSION) from None
    if message.schema_version:
        formats.WIRE.check(message.schema_version, where=f"draw {message.draw}")
    return from_message(message)


def from_message(message: pb.TrajectoryGroup) -> TrajectoryGroup:
    """Validate a group as it came; raises InvalidTrajectory whose `where` is the draw, and the response and token."""
    sampling = message.sampling
    try:
        return TrajectoryGroup(
            schema_version=message.schema_version,
            draw=message.draw,
            attempt=message.attempt,
            task=message.task,
            prompt_id=message.prompt_id,
            epoch=message.epoch,
            seed=message.seed,
            prompt_ids=_vector(message.prompt_ids, pb.DTYPE_INT32, "prompt_ids"),
            trajectories=tuple(_decode_trajectory(*each) for each in enumerate(message.trajectories)),
            sampling=SamplingParameters(
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                logprob_mode=_MODE_NAMES.get(sampling.logprob_mode, "unspecified"),
            ),
            engine=message.engine,
            worker=message.worker,
            traceparent=message.traceparent if valid(message.traceparent) else "",
        )
    except InvalidTrajectory as error:
        raise _inside(f"draw {message.draw}", error) from None


def check_against_run(group: TrajectoryGroup, *, vocabulary: int, versions: Mapping[int, int]) -> None:
    """Refuse ids outside the vocabulary, unknown policy versions, and versions said to come from another step."""
    draw = f"draw {group.draw}"
    _check_vocabulary(group.prompt_ids, vocabulary, f"{draw}, prompt")
    for index, each in enumerate(group.trajectories):
        place, at = f"{draw}, response {index}", 0
        _check_vocabulary(each.token_ids, vocabulary, place)
        for span in each.spans:
            _check_version(span, versions, f"{place}, token {at}")
            at += span.length


def _check_vocabulary(ids: NDArray[np.int32], vocabulary: int, place: str) -> None:
    if int(ids.max()) >= vocabulary:
        at = int(np.argmax(ids >= vocabulary))
        raise InvalidTrajectory(
            f"token id {ids[at]} is outside the vocabulary of {vocabulary}",
            where=f"{place}, token {at}",
            fix="encode and sample with the tokenizer and model of the run's published policy",
        )


def _check_version(span: VersionSpan, versions: Mapping[int, int], where: str) -> None:
    if span.version not in versions:
        raise InvalidTrajectory(
            f"policy version {span.version} is not one of the run's", where=where, fix=_SAMPLE_AGAIN
        )
    if versions[span.version] != span.step:
        what = f"policy version {span.version} comes from step {versions[span.version]}, not {span.step}"
        raise InvalidTrajectory(what, where=where, fix=_SAMPLE_AGAIN)


def _encode_trajectory(trajectory: Trajectory) -> pb.Trajectory:
    return pb.Trajectory(
        token_ids=_array(trajectory.token_ids, pb.DTYPE_INT32),
        behaviour_logprobs=_array(trajectory.behaviour_logprobs, pb.DTYPE_FLOAT32),
        loss_mask=_array(trajectory.loss_mask, pb.DTYPE_BOOL),
        spans=[
            pb.VersionSpan(length=span.length, policy_version=span.version, policy_step=span.step)
            for span in trajectory.spans
        ],
        rewards=dict(trajectory.rewards),
        finish_reason=_FINISH[trajectory.finish_reason],
    )


def _decode_trajectory(index: int, message: pb.Trajectory) -> Trajectory:
    try:
        return Trajectory(
            token_ids=_vector(message.token_ids, pb.DTYPE_INT32, "token_ids"),
            behaviour_logprobs=_vector(message.behaviour_logprobs, pb.DTYPE_FLOAT32, "behaviour_logprobs"),
            loss_mask=_vector(message.loss_mask, pb.DTYPE_BOOL, "loss_mask"),
            spans=tuple(VersionSpan(each.length, each.policy_version, each.policy_step) for each in message.spans),
            rewards=dict(message.rewards),
            finish_reason=_FINISH_NAMES.get(message.finish_reason, "unspecified"),
        )
    except InvalidTrajectory as error:
        raise _inside(f"response {index}", error) from None


def _inside(place: str, error: InvalidTrajectory) -> InvalidTrajectory:
    return InvalidTrajectory(error.what, where=", ".join(filter(None, (place, error.where))), fix=error.fix)


def _array(values: NDArray[Any], dtype: pb.DType) -> pb.Array:
    return pb.Array(dtype=dtype, length=len(values), data=values.astype(_DTYPES[dtype], copy=False).tobytes())


def _vector(array: pb.Array, dtype: pb.DType, name: str) -> NDArray[Any]:
    if array.dtype != dtype:
        known = pb.DType.values()
        given = pb.DType.Name(array.dtype) if array.dtype in known else f"unknown ({array.dtype})"
        what = f"{name} has dtype {given}, expected {pb.DType.Name(dtype)}"
        raise InvalidTrajectory(what, fix=_SAME_VERSION)
    layout = _DTYPES[dtype]
    if len(array.data) != array.length * layout.itemsize:
        raise InvalidTrajectory(
            f"{name} states {array.length} elements of {layout.itemsize} bytes but holds {len(array.data)} bytes",
            fix=_SAME_VERSION,
        )
    if dtype == pb.DTYPE_BOOL and array.data.strip(b"\x00\x01"):
        raise InvalidTrajectory(f"{name} holds a byte that is neither 0 nor 1", fix=_SAME_VERSION)
    return np.frombuffer(array.data, dtype=layout).astype(layout.newbyteorder("="), copy=False)
