"""Groups reach ingest at least once, in order, within the credits, whatever happens to the stream."""

import asyncio
import gc
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio

from protos.sapo.v1 import ingest_pb2 as pb
from protos.sapo.v1 import ingest_pb2_grpc as pb_grpc
from sapo_learner import errors
from sapo_learner.trajectory import SamplingParameters, Trajectory, TrajectoryGroup, VersionSpan
from services.rollout.sender import GroupSender
from services.runtime.auth import Credential
from services.runtime.grpc_errors import abort

Response = pb.StreamTrajectoryGroupsResponse
ACCEPTED, FULL, NOT_READY = pb.Ack.STATUS_ACCEPTED, pb.Ack.STATUS_FULL, pb.Ack.STATUS_NOT_READY
HELLO = pb.Hello(worker="w", tokenizer_digest="t", model_digest="m", schema_version=1)


def group(draw: int) -> TrajectoryGroup:
    response = Trajectory(
        token_ids=np.array([4, 1], np.int32),
        behaviour_logprobs=np.array([-1.0, -0.5], np.float32),
        loss_mask=np.ones(2, np.bool_),
        spans=(VersionSpan(2, 0, 0),),
        rewards={"correct": 1.0},
        finish_reason="stop",
    )
    return TrajectoryGroup(
        draw=draw, attempt=1, task="t", prompt_id="p", epoch=0, seed=draw, prompt_ids=np.array([3], np.int32),
        trajectories=(response,), sampling=SamplingParameters(1.0, 12), engine="e", worker="w",
    )  # fmt: skip


class Ingest(pb_grpc.TrajectoryIngestServiceServicer):
    """Answers as the test says. `seen`: what arrived, in order, over all streams."""

    def __init__(self) -> None:
        self.credits, self.refuse_with, self.welcomes = 64, None, True
        self.seen: asyncio.Queue[str] = asyncio.Queue()
        self.tokens: list[str] = []
        self.arrived: Counter[int] = Counter()
        self.judge: Callable[[int, int], Any] = lambda draw, nth: ACCEPTED  # -> status | "break" | None: no answer
        self.replies: asyncio.Queue[Response | None] = asyncio.Queue()  # None ends the stream

    async def StreamTrajectoryGroups(
        self, request_iterator: AsyncIterator[pb.StreamTrajectoryGroupsRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Response]:
        self.tokens.append(dict(context.invocation_metadata())["authorization"])
        if self.refuse_with:
            await context.abort(self.refuse_with, "go away")
        self.replies = replies = asyncio.Queue()
        reader = asyncio.create_task(self._read(request_iterator, replies))
        try:
            while (reply := await replies.get()) is not None:
                yield reply
            await context.abort(grpc.StatusCode.UNAVAILABLE, "broken")
        finally:
            reader.cancel()

    async def _read(self, requests: AsyncIterator[pb.StreamTrajectoryGroupsRequest], replies: Any) -> None:
        async for request in requests:
            if request.WhichOneof("message") == "hello":
                self.seen.put_nowait(f"hello {request.hello.worker}")
                if self.welcomes:
                    replies.put_nowait(Response(welcome=pb.Welcome(run="r", credits=self.credits)))
                continue
            draw = request.group.draw
            self.arrived[draw] += 1
            self.seen.put_nowait(f"group {draw}")
            verdict = self.judge(draw, self.arrived[draw])
            if verdict == "break":
                replies.put_nowait(None)
            elif verdict is not None:
                self.answer(draw, verdict, replies)

    def answer(self, draw: int, status: int, replies: Any = None) -> None:
        retry = 1 if status in (FULL, NOT_READY) else 0
        ack = pb.Ack(draw=draw, attempt=1, status=status, retry_after_ms=retry)  # type: ignore[arg-type]
        (replies or self.replies).put_nowait(Response(ack=ack))

    async def expect(self, *events: str) -> None:
        async with asyncio.timeout(10):
            assert [await self.seen.get() for _ in events] == list(events)


@asynccontextmanager
async def listening(ingest: Ingest, port: int = 0) -> AsyncIterator[str]:
    server = grpc.aio.server()
    pb_grpc.add_TrajectoryIngestServiceServicer_to_server(ingest, server)  # type: ignore[no-untyped-call]
    taken = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{taken}"
    finally:
        await server.stop(grace=None)


@asynccontextmanager
async def running(sender: GroupSender) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(sender.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def ingest() -> Ingest:
    return Ingest()


@pytest_asyncio.fixture
async def sender(ingest: Ingest) -> AsyncIterator[GroupSender]:
    async with listening(ingest) as address:
        sender = GroupSender(address, "secret", HELLO)
        async with running(sender):
            yield sender


def sending(sender: GroupSender, *draws: int) -> list[asyncio.Task[pb.Ack]]:
    return [asyncio.create_task(sender.send(group(draw))) for draw in draws]


async def statuses(tasks: list[asyncio.Task[pb.Ack]]) -> list[int]:
    async with asyncio.timeout(10):
        return [ack.status for ack in await asyncio.gather(*tasks)]


async def test_the_hello_comes_first_with_the_token_and_then_the_groups_in_order(
    ingest: Ingest, sender: GroupSender
) -> None:
    assert await statuses(sending(sender, 5, 3, 9)) == [ACCEPTED] * 3
    await ingest.expect("hello w", "group 5", "group 3", "group 9")
    assert ingest.tokens == ["Bearer secret"]
    assert sender.unacknowledged == 0


async def test_groups_without_an_ack_are_sent_again_in_order_when_the_stream_breaks(
    ingest: Ingest, sender: GroupSender
) -> None:
    ingest.judge = lambda draw, nth: None
    tasks = sending(sender, 5, 3, 9)
    await ingest.expect("hello w", "group 5", "group 3", "group 9")
    ingest.answer(3, ACCEPTED)
    assert await statuses(tasks[1:2]) == [ACCEPTED]
    ingest.judge = lambda draw, nth: pb.Ack.STATUS_DUPLICATE if draw == 5 else ACCEPTED
    ingest.replies.put_nowait(None)
    await ingest.expect("hello w", "group 5", "group 9")
    assert await statuses(tasks) == [pb.Ack.STATUS_DUPLICATE, ACCEPTED, ACCEPTED]


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Nothing is swept up that somebody forgot to end."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
async def test_a_stream_that_breaks_again_and_again_leaves_no_task_behind(ingest: Ingest, sender: GroupSender) -> None:
    ingest.judge = lambda draw, nth: "break" if nth < 4 else ACCEPTED
    assert await statuses(sending(sender, 1)) == [ACCEPTED]
    assert ingest.arrived[1] == 4
    polling = [task for task in asyncio.all_tasks() if "_consume_request_iterator" in repr(task)]
    assert len(polling) == 1


async def test_never_more_groups_are_unacknowledged_than_there_are_credits(ingest: Ingest, sender: GroupSender) -> None:
    ingest.credits, ingest.judge = 2, lambda draw, nth: None
    tasks = sending(sender, *range(5))
    await ingest.expect("hello w", "group 0", "group 1")
    assert sender.unacknowledged == 2
    ingest.answer(1, ACCEPTED)
    await ingest.expect("group 2")
    assert sender.unacknowledged == 2
    ingest.replies.put_nowait(Response(credits=pb.Credits(limit=3)))
    await ingest.expect("group 3")
    assert sender.unacknowledged == 3
    ingest.judge = lambda draw, nth: ACCEPTED
    for draw in (0, 2, 3):
        ingest.answer(draw, ACCEPTED)
    await ingest.expect("group 4")
    assert await statuses(tasks) == [ACCEPTED] * 5


@pytest.mark.parametrize("status", [FULL, NOT_READY])
async def test_a_group_that_finds_no_place_is_sent_again_until_it_does(
    ingest: Ingest, sender: GroupSender, status: int
) -> None:
    ingest.judge = lambda draw, nth: status if draw == 1 and nth < 4 else ACCEPTED
    assert await statuses(sending(sender, 1, 2)) == [ACCEPTED, ACCEPTED]
    assert ingest.arrived == {1: 4, 2: 1}


@pytest.mark.parametrize("name", ["ACCEPTED", "DUPLICATE", "EXPIRED", "INVALID"])
async def test_every_other_ack_is_final(ingest: Ingest, sender: GroupSender, name: str) -> None:
    status = getattr(pb.Ack, f"STATUS_{name}")
    ingest.judge = lambda draw, nth: status
    assert await statuses(sending(sender, 1)) == [status]
    ingest.replies.put_nowait(None)
    ingest.judge = lambda draw, nth: ACCEPTED
    assert await statuses(sending(sender, 2)) == [ACCEPTED]
    assert ingest.arrived[1] == 1  # of the other, the first may have gone down with the stream


async def test_a_group_that_is_given_up_returns_its_credit_and_is_not_sent_again(
    ingest: Ingest, sender: GroupSender
) -> None:
    ingest.credits, ingest.judge = 1, lambda draw, nth: ACCEPTED if draw else None
    doomed, other = sending(sender, 0, 1)
    await ingest.expect("hello w", "group 0")
    doomed.cancel()
    assert await statuses([other]) == [ACCEPTED]
    assert ingest.arrived == {0: 1, 1: 1}


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, errors.Unauthenticated),
        (grpc.StatusCode.FAILED_PRECONDITION, errors.Mismatch),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidTrajectory),
    ],
)
async def test_a_refusal_for_good_ends_the_sender_with_our_error(
    ingest: Ingest, code: grpc.StatusCode, error: type[errors.SapoError]
) -> None:
    ingest.refuse_with = code  # type: ignore[assignment]
    async with listening(ingest) as address, asyncio.timeout(10):
        with pytest.raises(error, match="go away"):
            await GroupSender(address, "secret", HELLO).run()


async def test_an_ingest_that_is_not_there_yet_is_waited_for(ingest: Ingest) -> None:
    async with listening(Ingest()) as address:
        pass  # now nobody listens there
    sender = GroupSender(address, "secret", HELLO)
    async with running(sender):
        tasks = sending(sender, 1)
        async with listening(ingest, int(address.rpartition(":")[2])):
            assert await statuses(tasks) == [ACCEPTED]


async def test_an_ingest_that_owes_an_answer_for_too_long_is_connected_to_anew(ingest: Ingest) -> None:
    ingest.judge = lambda draw, nth: None if nth == 1 else ACCEPTED
    async with listening(ingest) as address:
        sender = GroupSender(address, "secret", HELLO, answer_seconds=0.2)
        async with running(sender):
            assert await statuses(sending(sender, 1)) == [ACCEPTED]
            await ingest.expect("hello w", "group 1", "hello w", "group 1")


async def test_a_quiet_stream_without_debts_is_left_open(ingest: Ingest) -> None:
    async with listening(ingest) as address:
        sender = GroupSender(address, "secret", HELLO, answer_seconds=0.02)
        async with running(sender) as task:
            assert await statuses(sending(sender, 1)) == [ACCEPTED]
            await asyncio.wait([task], timeout=0.1)  # several times that long
            assert await statuses(sending(sender, 2)) == [ACCEPTED]
    await ingest.expect("hello w", "group 1", "group 2")


# ---- an ingest that cannot be reached, and groups that cannot be sent


@asynccontextmanager
async def nobody() -> AsyncIterator[str]:
    """The port is closed."""
    async with listening(Ingest()) as address:
        pass
    yield address


@asynccontextmanager
async def silence() -> AsyncIterator[str]:
    """Connections are accepted, and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as peer:
        yield f"127.0.0.1:{peer.getsockname()[1]}"


@pytest.mark.parametrize("peer", [nobody, silence])
async def test_an_ingest_that_cannot_be_reached_is_given_up_after_a_while(
    peer: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with peer() as address, asyncio.timeout(10):
        with pytest.raises(errors.Unavailable) as caught:
            await GroupSender(address, "secret", HELLO, patience=0.6, answer_seconds=0.1).run()
    assert caught.value.where == address
    assert caught.value.what.startswith("ingest cannot be reached, tried for 0.6 s: ")
    assert caught.value.fix == "is it running, and is SAPO_INGEST_ADDRESS its address?"
    said = [record.getMessage() for record in caplog.records if "trying again" in record.getMessage()]
    assert len(said) == len(set(said)) >= 1, "once per distinct problem"


async def test_patience_counts_from_when_ingest_was_last_there(ingest: Ingest) -> None:
    """Not from its last message: a stream may be quiet for as long as sampling takes."""
    async with listening(ingest) as address:
        sender = GroupSender(address, "secret", HELLO, patience=0.5)
        async with running(sender) as task:
            assert await statuses(sending(sender, 1)) == [ACCEPTED]
            await asyncio.wait([task], timeout=0.6)  # longer than its patience
            ingest.replies.put_nowait(None)
            assert await statuses(sending(sender, 2)) == [ACCEPTED]
    await ingest.expect("hello w", "group 1", "hello w", "group 2")


async def test_an_ingest_that_says_what_it_waits_for_is_waited_for(ingest: Ingest) -> None:
    class Waiting(Ingest):
        async def StreamTrajectoryGroups(self, request_iterator: Any, context: Any) -> AsyncIterator[Response]:
            self.seen.put_nowait("asked")
            await abort(context, errors.Unavailable("no policy is published yet", where="ingest"))
            yield Response()

    waiting = Waiting()
    async with listening(waiting) as address, running(GroupSender(address, "secret", HELLO, patience=0.05)) as task:
        await waiting.expect("asked", "asked", "asked", "asked")
        assert not task.done()


@pytest.mark.parametrize(
    "kind", [errors.Unauthenticated, errors.Forbidden, errors.Mismatch, errors.ConfigError, errors.InvalidTrajectory]
)
async def test_what_ingest_says_ends_the_worker_word_for_word(kind: type[errors.SapoError]) -> None:
    class Refusing(Ingest):
        async def StreamTrajectoryGroups(self, request_iterator: Any, context: Any) -> AsyncIterator[Response]:
            await abort(context, kind("wrong", where="here", fix="mend it"))
            yield Response()

    async with listening(Refusing()) as address, asyncio.timeout(10):
        with pytest.raises(errors.SapoError) as caught:
            await GroupSender(address, "secret", HELLO).run()
    assert (type(caught.value), str(caught.value)) == (kind, "here: wrong (mend it)")


async def test_a_group_beyond_the_limit_is_refused_before_it_is_sent(ingest: Ingest) -> None:
    async with listening(ingest) as address:
        sender = GroupSender(address, "secret", HELLO, max_message_bytes=200)
        async with running(sender):
            assert await statuses(sending(sender, 1)) == [ACCEPTED]
            with pytest.raises(errors.InvalidTrajectory) as caught:
                await sender.send(replace(group(2), engine="x" * 200))
            assert re.fullmatch(
                r"draw 2: \d+ bytes exceed the 200 of one message \(lower sampling.max_tokens or sampling.group_size\)",
                str(caught.value),
            )
            assert (sender.unacknowledged, await statuses(sending(sender, 3))) == (0, [ACCEPTED])
    await ingest.expect("hello w", "group 1", "group 3")


async def test_a_token_that_is_exchanged_in_its_file_is_taken_up_and_no_group_is_lost(tmp_path: Path) -> None:
    """Ingest knows only the new one from a group's arrival on; the worker's file follows when it has been refused."""
    old, new, path = "the-old-token-of-the-run", "the-new-token-of-the-run", tmp_path / "token"
    path.write_text(old)

    class Exchanging(Ingest):
        async def StreamTrajectoryGroups(self, request_iterator: Any, context: Any) -> AsyncIterator[Response]:
            given = dict(context.invocation_metadata())["authorization"]
            if self.arrived and given != f"Bearer {new}":
                path.write_text(new)
                await abort(context, errors.Unauthenticated("wrong or missing token"))
            async for response in super().StreamTrajectoryGroups(request_iterator, context):
                yield response

    exchanging = Exchanging()
    exchanging.judge = lambda draw, nth: "break" if nth == 1 else ACCEPTED
    async with listening(exchanging) as address:
        sender = GroupSender(address, Credential(file=str(path)), HELLO)
        async with running(sender), asyncio.timeout(20):
            assert await statuses(sending(sender, 1)) == [ACCEPTED]
    assert exchanging.tokens == [f"Bearer {old}", f"Bearer {new}"]
