"""The gRPC endpoint: validates groups, appends them to the log once, acknowledges.

A stream's groups are answered in the order they came. An ack is sent only after the append script has answered, so an
accepted group is in the log, and nothing else is ever acknowledged as such.
"""

import logging
import time
from collections.abc import AsyncIterator, Mapping

import grpc

from protos.sapo.v1 import ingest_pb2 as pb
from protos.sapo.v1 import ingest_pb2_grpc as pb_grpc
from protos.sapo.v1 import trajectory_pb2
from sapo_learner.errors import InvalidTrajectory, Mismatch, SapoError, Unavailable
from sapo_learner.trajectory import SCHEMA_VERSION
from services.runstore import RunStore
from services.runtime.metrics import IngestMetrics
from services.runtime.settings import RunConfig
from services.wire import check_against_run, from_message

log = logging.getLogger(__name__)

_Response = pb.StreamTrajectoryGroupsResponse
RETRY_MS = 250
_STATUS = {
    "OK": pb.Ack.STATUS_ACCEPTED,
    "DUPLICATE": pb.Ack.STATUS_DUPLICATE,
    "EXPIRED": pb.Ack.STATUS_EXPIRED,
    "FULL": pb.Ack.STATUS_FULL,
    "NOT_READY": pb.Ack.STATUS_NOT_READY,
}
_REASON = {
    "EXPIRED": "the draw was offered again, or was never leased to this attempt",
    "FULL": "the log's head is full: the learner has not read it yet",
    "NOT_READY": "the log is being built",
}


class IngestServicer(pb_grpc.TrajectoryIngestServiceServicer):
    def __init__(self, config: RunConfig, store: RunStore, metrics: IngestMetrics) -> None:
        self._config, self._store, self._metrics = config, store, metrics
        self._versions: dict[int, int] = {}

    async def StreamTrajectoryGroups(
        self,
        request_iterator: AsyncIterator[pb.StreamTrajectoryGroupsRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[pb.StreamTrajectoryGroupsResponse]:
        worker = ""
        with self._metrics.streams.track_inprogress():
            try:
                async for request in request_iterator:
                    if request.WhichOneof("message") == "hello":
                        worker = await self._greet(request.hello)
                        welcome = pb.Welcome(run=self._config.run.name, credits=self._config.ingest.credits)
                        yield _Response(welcome=welcome)
                    elif not worker:
                        raise InvalidTrajectory(
                            "the first message of a stream is a hello", where="StreamTrajectoryGroups"
                        )
                    else:
                        yield _Response(ack=await self._accept(request.group))
            except SapoError as error:
                log.warning("stream of %s refused: %s", worker or "an unknown worker", error)
                await context.abort(grpc.StatusCode[error.code], str(error))

    async def _greet(self, hello: pb.Hello) -> str:
        """Refuse a worker whose tokens would mean something else."""
        facts = await self._store.facts()
        if not facts:
            raise Unavailable(
                "no policy is published yet", where="ingest", fix="try again when the learner has started"
            )
        if hello.schema_version != SCHEMA_VERSION:
            raise Mismatch(f"schema version {hello.schema_version}, this run's is {SCHEMA_VERSION}", where=hello.worker)
        for name, given in (("tokenizer_digest", hello.tokenizer_digest), ("model_digest", hello.model_digest)):
            if given != facts[name]:
                raise Mismatch(
                    f"{name} {given[:12] or 'missing'} differs from the run's {facts[name][:12]}",
                    where=hello.worker or "hello",
                    fix="start the worker from the files of the run's published policy",
                )
        if not hello.worker:
            raise InvalidTrajectory("the hello names no worker", where="StreamTrajectoryGroups")
        log.info("worker %s connected", hello.worker)
        return str(hello.worker)

    async def _accept(self, message: trajectory_pb2.TrajectoryGroup) -> pb.Ack:
        started = time.perf_counter()
        ack = await self._judge(message)
        self._metrics.acks.labels(pb.Ack.Status.Name(ack.status).removeprefix("STATUS_").lower()).inc()
        self._metrics.seconds.observe(time.perf_counter() - started)
        return ack

    async def _judge(self, message: trajectory_pb2.TrajectoryGroup) -> pb.Ack:
        ack = pb.Ack(draw=message.draw, attempt=message.attempt)
        try:
            group = from_message(message)
            facts = await self._known(max(span.version for each in group.trajectories for span in each.spans))
            check_against_run(group, vocabulary=int(facts["vocabulary"]), versions=self._versions)
            self._check_against_config(message, len(group.trajectories))
        except InvalidTrajectory as error:
            log.warning("invalid group: %s", error)
            ack.status, ack.reason = pb.Ack.STATUS_INVALID, str(error)
            return ack
        payload = message.SerializeToString(deterministic=True)
        limits = self._config.ingest
        result = await self._store.append(
            group.draw, group.attempt, payload, max_entries=limits.max_entries, max_bytes=limits.max_bytes
        )
        ack.status, ack.entry_id, ack.reason = _STATUS[result.status], result.id, _REASON.get(result.status, "")
        if result.status == "OK":
            self._metrics.bytes.inc(len(payload))
        elif result.status in ("FULL", "NOT_READY"):
            ack.retry_after_ms = RETRY_MS
        return ack

    async def _known(self, newest: int) -> Mapping[str, str]:
        """The run's facts; refreshes the known versions when a group speaks of one not seen yet."""
        if newest not in self._versions:
            self._versions = await self._store.versions()
            self._facts = await self._store.facts()
        return self._facts

    def _check_against_config(self, message: trajectory_pb2.TrajectoryGroup, responses: int) -> None:
        """Groups of another task, size or temperature would be trained on as if they were this run's."""
        expected = self._config.sampling
        for name, given, wanted in (
            ("task", message.task, self._config.task.name),
            ("number of responses", responses, expected.group_size),
            ("sampling.temperature", message.sampling.temperature, expected.temperature),
            ("sampling.max_tokens", message.sampling.max_tokens, expected.max_tokens),
        ):
            if given != wanted:
                raise InvalidTrajectory(f"{name} is {given!r}, the run's is {wanted!r}", where=f"draw {message.draw}")
