"""The gRPC endpoint: validates groups, appends them to the log once, acknowledges.

A stream's groups are answered in the order they came. An ack is sent only after the append script has answered, so an
accepted group is in the log, and nothing else is ever acknowledged as such. A stream that breaks in between may leave a
group appended and unacknowledged: it comes again, and is a duplicate, also when it would no longer be valid.

A malformed group gives its draw back: it is offered again, with the same seed, and set aside when every group of it is
malformed. It stays open then, so the ledger still balances, and the run goes on without it.
"""

import logging
import time
from collections.abc import AsyncIterator

import grpc
from google.protobuf.message import DecodeError

from protos.sapo.v1 import ingest_pb2 as pb
from protos.sapo.v1 import ingest_pb2_grpc as pb_grpc
from protos.sapo.v1 import trajectory_pb2
from sapo_learner import formats
from sapo_learner.errors import ConfigError, InvalidTrajectory, Mismatch, SapoError, Unauthenticated, Unavailable
from sapo_learner.trajectory import TrajectoryGroup
from services.ingest.open_streams import Counted, OpenStreams
from services.ingest.own_acks import OwnAcks
from services.runstore import Refusal, RunStore
from services.runtime import api
from services.runtime.grpc_errors import abort
from services.runtime.logging import about
from services.runtime.metrics import IngestMetrics
from services.runtime.settings import RunConfig
from services.runtime.tracing import trace_id
from services.wire import check_against_run, from_message

log = logging.getLogger(__name__)

_Response = pb.StreamTrajectoryGroupsResponse
RETRY_MS = 250
HELLO_SECONDS = 30.0
_STATUS = {
    "OK": pb.Ack.STATUS_ACCEPTED,
    "DUPLICATE": pb.Ack.STATUS_DUPLICATE,
    "EXPIRED": pb.Ack.STATUS_EXPIRED,
    "FULL": pb.Ack.STATUS_FULL,
    "NOT_READY": pb.Ack.STATUS_NOT_READY,
}
# What, and what to do: the place is put in front.
_REASON = {
    "DUPLICATE": "accepted before (forget this group: it is in the log once)",
    "EXPIRED": "offered again, or never leased to this attempt (forget this group: the draw is sampled anew)",
    "FULL": "the log's head is full, the learner has not read it yet (keep the group, it is asked for again)",
    "NOT_READY": "the log is being built (keep the group, it is asked for again)",
}
_STREAM = "StreamTrajectoryGroups"
_SAME_VERSION = "run worker and ingest at the same version"


class IngestServicer(pb_grpc.TrajectoryIngestServiceServicer):
    def __init__(
        self, config: RunConfig, store: RunStore, metrics: IngestMetrics, *, hello_seconds: float = HELLO_SECONDS
    ) -> None:
        """hello_seconds: how long a stream may be open before it says whose it is. Of too many such streams the oldest
        ends at once: it takes no place from a worker that says hello."""
        self._config, self._store, self._metrics, self._hello_seconds = config, store, metrics, hello_seconds
        # What the run says of itself; read again when a group names a version that is not among them.
        self._versions: dict[int, int] = {}
        self._facts: dict[str, str] = {}
        self._acks, self._open = OwnAcks(), OpenStreams()

    async def StreamTrajectoryGroups(
        self,
        request_iterator: AsyncIterator[pb.StreamTrajectoryGroupsRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[pb.StreamTrajectoryGroupsResponse]:
        worker, requests = "", aiter(request_iterator)
        with self._metrics.streams.track_inprogress():
            try:
                hello = await self._hello(requests)
                if hello is None:
                    return
                worker = await self._greet(hello)
                with self._open.greeted(worker):
                    yield _Response(welcome=pb.Welcome(run=self._config.run.name, credits=self._config.ingest.credits))
                    async for request in requests:
                        if request.WhichOneof("message") != "group":
                            raise _out_of_order(worker)
                        yield _Response(ack=await self._accept(request.group, worker))
            except (SapoError, DecodeError) as error:
                refusal = _as_refusal(error)
                if not isinstance(error, Counted):
                    log.warning("stream of %s refused: %s", worker or "an unknown worker", refusal)
                await abort(context, refusal)

    async def _hello(self, requests: AsyncIterator[pb.StreamTrajectoryGroupsRequest]) -> pb.Hello | None:
        """None: the stream is over."""
        async with self._open.before_hello(self._hello_seconds):
            first = await anext(requests, None)
        if first is not None and first.WhichOneof("message") != "hello":
            raise _out_of_order("an unknown worker")
        return first.hello if first is not None else None

    async def _greet(self, hello: pb.Hello) -> str:
        """Refuse a worker whose tokens would mean something else."""
        facts = await self._store.facts()
        if not facts:
            raise Unavailable(
                "no policy is published yet", where="ingest", fix="try again when the learner has started"
            )
        try:
            api.check_worker_name(hello.worker)
        except ValueError as error:
            raise ConfigError(str(error), where=_STREAM, fix="choose another --name") from None
        if not formats.WIRE.reads(version := hello.schema_version):
            what = formats.WIRE.refusal(version, reader="this ingest")
            raise Mismatch(what, where=hello.worker, fix=formats.WIRE.fix(version))
        for name, given in (("tokenizer_digest", hello.tokenizer_digest), ("model_digest", hello.model_digest)):
            if given != facts[name]:
                raise Mismatch(
                    f"{name} {given[:12] or 'missing'} differs from the run's {facts[name][:12]}",
                    where=hello.worker,
                    fix="start the worker from the files of the run's published policy",
                )
        log.info("worker %s connected", hello.worker)
        return str(hello.worker)

    async def _accept(self, message: trajectory_pb2.TrajectoryGroup, worker: str) -> pb.Ack:
        started = time.perf_counter()
        ack, trace = pb.Ack(draw=message.draw, attempt=message.attempt), trace_id(message.traceparent)
        with about(draw=message.draw, attempt=message.attempt, worker=worker, trace_id=trace):
            try:
                await self._judge(message, worker, ack)
            except (Unavailable, Unauthenticated) as error:
                # Redis is away. Whether it took the group before or not, the worker keeps it and asks again.
                log.warning("draw %d must wait: %s", message.draw, error)
                ack.status, ack.reason = pb.Ack.STATUS_NOT_READY, str(error)
            _tell(ack)
        if ack.status in (pb.Ack.STATUS_FULL, pb.Ack.STATUS_NOT_READY):
            ack.retry_after_ms = RETRY_MS
        self._metrics.acks.labels(pb.Ack.Status.Name(ack.status).removeprefix("STATUS_").lower()).inc()
        self._metrics.seconds.observe(time.perf_counter() - started)
        return ack

    async def _judge(self, message: trajectory_pb2.TrajectoryGroup, worker: str, ack: pb.Ack) -> None:
        """Validate, append, and note the result in `ack`. Raises Unavailable."""
        try:
            group = from_message(message)
            if not group.traceparent:
                message.ClearField("traceparent")  # what is malformed stays out of the log
            await self._learn_of(group)
            check_against_run(group, vocabulary=int(self._facts["vocabulary"]), versions=self._versions)
            self._check_against_config(group)
        except InvalidTrajectory as error:
            self._note_refusal(ack, error, await self._store.refuse(worker, message.draw, message.attempt))
            return
        payload = message.SerializeToString(deterministic=True)
        limits, before = self._config.ingest, self._acks.now()
        result = await self._store.append(
            group.draw, group.attempt, payload, max_entries=limits.max_entries, max_bytes=limits.max_bytes
        )
        ack.status, ack.entry_id, ack.reason = _STATUS[result.status], result.id, _reason(ack, result.status)
        if result.status == "OK":
            self._metrics.bytes.inc(len(payload))
            self._note_forgotten(self._acks.note(before, result.sequence), result.id)

    def _note_forgotten(self, count: int, entry_id: str) -> None:
        if count:
            self._metrics.forgotten.inc(count)
            log.error(
                "Redis has forgotten %d groups that were acknowledged: the log goes on with entry %s; their draws are "
                "sampled anew (appendfsync always would have kept them)", count, entry_id,
            )  # fmt: skip

    def _note_refusal(self, ack: pb.Ack, error: InvalidTrajectory, refusal: Refusal) -> None:
        """What is settled is settled: a version may have been forgotten since the group was accepted."""
        if refusal.status != "INVALID":
            ack.status, ack.reason = _STATUS[refusal.status], _reason(ack, refusal.status)
            return
        if refusal.set_aside:
            fate = (
                f"all {refusal.refusals} groups of this draw were malformed: it is set aside, open, and offered again "
                "when a control plane starts"
            )
        else:
            fate = "the draw is offered again" if refusal.refusals else "the draw is another worker's"
        ack.status, ack.reason = pb.Ack.STATUS_INVALID, f"{error}; {fate}"
        log.log(logging.ERROR if refusal.set_aside else logging.WARNING, "invalid group: %s", ack.reason)

    async def _learn_of(self, group: TrajectoryGroup) -> None:
        """Read the run's versions and facts again when the group speaks of a version that is not known here."""
        if all(span.version in self._versions for each in group.trajectories for span in each.spans):
            return
        versions, facts = await self._store.versions(), await self._store.facts()
        if not versions or not facts:
            raise Unavailable("the policy registry is being restored", where="Redis", fix="try again")
        self._versions, self._facts = versions, facts

    def _check_against_config(self, group: TrajectoryGroup) -> None:
        """Groups of another task, size or temperature would be trained on as if they were this run's."""
        expected = self._config.sampling
        draw, settings = f"draw {group.draw}", "the worker must take the run's settings from its control plane"
        for name, given, wanted in (
            ("number of responses", len(group.trajectories), expected.group_size),
            ("sampling.temperature", group.sampling.temperature, expected.temperature),
            ("sampling.max_tokens", group.sampling.max_tokens, expected.max_tokens),
        ):
            if given != wanted:
                raise InvalidTrajectory(f"{name} is {_short(given)}, the run's is {wanted!r}", where=draw, fix=settings)
        labels = [each.called for each in self._config.mixture]
        if group.task not in labels:
            what = f"task is {_short(group.task)}, the run's is {' or '.join(map(repr, labels))}"
            raise InvalidTrajectory(what, where=draw, fix=settings)
        context = int(self._facts["context"]) if "context" in self._facts else None
        for index, each in enumerate(group.trajectories):
            where, sampled = f"{draw}, response {index}", int(each.loss_mask.sum())
            if sampled > expected.max_tokens:
                what = f"{sampled} sampled tokens, sampling.max_tokens is {expected.max_tokens}"
                raise InvalidTrajectory(what, where=where, fix=settings)
            length = len(group.prompt_ids) + len(each.token_ids)
            if context is not None and length > context:
                what = f"prompt and response have {length} tokens, the model's context is {context}"
                raise InvalidTrajectory(what, where=where, fix="stop sampling there, or lower sampling.max_tokens")


def _tell(ack: pb.Ack) -> None:
    """The way of each group at DEBUG; what is unusual is INFO, or was said already."""
    if ack.status == pb.Ack.STATUS_ACCEPTED:
        log.debug("draw %d is entry %s of the log", ack.draw, ack.entry_id, extra={"entry": ack.entry_id})
    elif ack.status in (pb.Ack.STATUS_DUPLICATE, pb.Ack.STATUS_EXPIRED):
        log.info("%s", ack.reason)
    elif ack.status != pb.Ack.STATUS_INVALID:
        log.debug("draw %d must wait: %s", ack.draw, ack.reason)


def _out_of_order(worker: str) -> InvalidTrajectory:
    what = f"{worker} sent something else: a stream is one hello, then groups"
    return InvalidTrajectory(what, where=_STREAM, fix=_SAME_VERSION)


def _as_refusal(error: SapoError | DecodeError) -> SapoError:
    if isinstance(error, DecodeError):
        return InvalidTrajectory(f"not a message of sapo.v1: {error}", where=_STREAM, fix=_SAME_VERSION)
    if isinstance(error, Unauthenticated):
        # Redis refuses ingest: no reason for the worker to think that its own token is wrong.
        return Unavailable(error.what, where=error.where, fix=error.fix)
    return error


def _reason(ack: pb.Ack, status: str) -> str:
    return f"draw {ack.draw}, attempt {ack.attempt}: {_REASON[status]}" if status in _REASON else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
