"""The gRPC endpoint: validates groups, appends them to the log once, acknowledges.

A stream's groups are answered in the order they came. An ack is sent only after the append script has answered, so an
accepted group is in the log, and nothing else is ever acknowledged as such. A stream that breaks in between may leave a
group appended and unacknowledged: it comes again, and is a duplicate.
"""

import logging
import time
from collections.abc import AsyncIterator

import grpc

from protos.sapo.v1 import ingest_pb2 as pb
from protos.sapo.v1 import ingest_pb2_grpc as pb_grpc
from protos.sapo.v1 import trajectory_pb2
from sapo_learner.errors import InvalidTrajectory, Mismatch, SapoError, Unavailable
from sapo_learner.trajectory import SCHEMA_VERSION, TrajectoryGroup
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
        # What the run says of itself; read again when a group names a version that is not among them.
        self._versions: dict[int, int] = {}
        self._facts: dict[str, str] = {}

    async def StreamTrajectoryGroups(
        self,
        request_iterator: AsyncIterator[pb.StreamTrajectoryGroupsRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[pb.StreamTrajectoryGroupsResponse]:
        worker = ""
        with self._metrics.streams.track_inprogress():
            try:
                async for request in request_iterator:
                    match request.WhichOneof("message"), worker:
                        case "hello", "":
                            worker = await self._greet(request.hello)
                            welcome = pb.Welcome(run=self._config.run.name, credits=self._config.ingest.credits)
                            yield _Response(welcome=welcome)
                        case "group", str(name) if name:
                            yield _Response(ack=await self._accept(request.group))
                        case _:
                            raise InvalidTrajectory(
                                "a stream is one hello, then groups", where="StreamTrajectoryGroups"
                            )
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
        if not hello.worker:
            raise InvalidTrajectory("the hello names no worker", where="StreamTrajectoryGroups")
        if hello.schema_version != SCHEMA_VERSION:
            raise Mismatch(f"schema version {hello.schema_version}, this run's is {SCHEMA_VERSION}", where=hello.worker)
        for name, given in (("tokenizer_digest", hello.tokenizer_digest), ("model_digest", hello.model_digest)):
            if given != facts[name]:
                raise Mismatch(
                    f"{name} {given[:12] or 'missing'} differs from the run's {facts[name][:12]}",
                    where=hello.worker,
                    fix="start the worker from the files of the run's published policy",
                )
        log.info("worker %s connected", hello.worker)
        return str(hello.worker)

    async def _accept(self, message: trajectory_pb2.TrajectoryGroup) -> pb.Ack:
        started = time.perf_counter()
        ack = pb.Ack(draw=message.draw, attempt=message.attempt)
        try:
            await self._judge(message, ack)
        except InvalidTrajectory as error:
            log.warning("invalid group: %s", error)
            ack.status, ack.reason = pb.Ack.STATUS_INVALID, str(error)
        except Unavailable as error:
            # Redis is away. Whether it took the group before or not, the worker keeps it and asks again.
            log.warning("draw %d must wait: %s", message.draw, error)
            ack.status, ack.reason = pb.Ack.STATUS_NOT_READY, str(error)
        if ack.status in (pb.Ack.STATUS_FULL, pb.Ack.STATUS_NOT_READY):
            ack.retry_after_ms = RETRY_MS
        self._metrics.acks.labels(pb.Ack.Status.Name(ack.status).removeprefix("STATUS_").lower()).inc()
        self._metrics.seconds.observe(time.perf_counter() - started)
        return ack

    async def _judge(self, message: trajectory_pb2.TrajectoryGroup, ack: pb.Ack) -> None:
        """Validate, append, and note the result in `ack`. Raises InvalidTrajectory, Unavailable."""
        group = from_message(message)
        await self._learn_of(group)
        check_against_run(group, vocabulary=int(self._facts["vocabulary"]), versions=self._versions)
        self._check_against_config(group)
        payload = message.SerializeToString(deterministic=True)
        limits = self._config.ingest
        result = await self._store.append(
            group.draw, group.attempt, payload, max_entries=limits.max_entries, max_bytes=limits.max_bytes
        )
        ack.status, ack.entry_id, ack.reason = _STATUS[result.status], result.id, _REASON.get(result.status, "")
        if result.status == "OK":
            self._metrics.bytes.inc(len(payload))

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
        for name, given, wanted in (
            ("task", group.task, self._config.task.name),
            ("number of responses", len(group.trajectories), expected.group_size),
            ("sampling.temperature", group.sampling.temperature, expected.temperature),
            ("sampling.max_tokens", group.sampling.max_tokens, expected.max_tokens),
        ):
            if given != wanted:
                raise InvalidTrajectory(f"{name} is {given!r}, the run's is {wanted!r}", where=f"draw {group.draw}")
        sampled = max(int(each.loss_mask.sum()) for each in group.trajectories)
        if sampled > expected.max_tokens:
            raise InvalidTrajectory(
                f"a response has {sampled} sampled tokens, sampling.max_tokens is {expected.max_tokens}",
                where=f"draw {group.draw}",
            )
        longest = len(group.prompt_ids) + max(len(each.token_ids) for each in group.trajectories)
        context = int(self._facts.get("context", longest))
        if longest > context:
            raise InvalidTrajectory(
                f"prompt and response have {longest} tokens, the model's context is {context}",
                where=f"draw {group.draw}",
            )
