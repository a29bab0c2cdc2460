"""The ranks that share one optimizer step: data parallel, one process each, under torch.distributed or alone.

Every rank collates the whole step, so that denominators are global already, and takes its own microbatches, each rank
equally many. Figures of the step are then put together, and so are gradients (`sapo_learner.sharding`): after that each
rank holds the same numbers and makes the same update, or refuses the same one.

    torchrun --nproc-per-node 2 ...        ranks = join(device); Learner(policy, settings, temperature=1.0, ranks=ranks)

What is said between ranks goes as CPU tensors, over gloo, also beside NCCL.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from textwrap import shorten
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from sapo_learner.errors import SapoError, Unavailable

Parts = dict[int, dict[str, Tensor]]
"""Microbatch of the step -> name -> [n] figures, float64 on the CPU."""
T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another that is alive and says nothing; one that died is noticed at once."""
TICK_SECONDS = 5.0
JOIN_SECONDS = 0.1  # between two looks whether all have come
SAID = "said by rank 0"
"""Note on an error that rank 0 raises, too, so that nobody says it twice."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the `size` of its process group; without one, alone. Rank 0 is the one with the log."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_process_group(cls) -> "Ranks":
        """Those of torch.distributed's default group, which must be there."""
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        return self.rank == 0

    def shares(self, costs: Sequence[int]) -> list[list[int | None]]:
        """By rank, which microbatches are whose, in order; then None, up to the same number for every rank.

        costs: tokens of each; the largest goes first, to whoever has least so far, so that every rank comes to the same
        answer. Every forward pass gathers weights from all ranks, so none may make fewer than another.
        """
        most = -(-len(costs) // self.size)
        load, owned = [0] * self.size, [list[int]() for _ in range(self.size)]
        for index in sorted(range(len(costs)), key=lambda each: -costs[each]):
            rank = min((each for each in range(self.size) if len(owned[each]) < most), key=lambda each: load[each])
            owned[rank].append(index)
            load[rank] += costs[index]
        return [[*sorted(each), *[None] * (most - len(each))] for each in owned]

    def gathered(self, parts: Mapping[int, Mapping[str, Tensor]]) -> Parts:
        """The figures of all ranks, ordered by microbatch, the same bits on every rank. parts: this rank's."""
        if self.size == 1:
            return {index: dict(parts[index]) for index in sorted(parts)}
        shapes = [(index, name, len(values)) for index, part in parts.items() for name, values in part.items()]
        layout = sorted(each for said in self.said(shapes) for each in said)
        whole = torch.zeros(sum(length for _, _, length in layout), dtype=torch.float64)
        found: Parts = {}
        start = 0
        for index, name, length in layout:
            values = whole[start : start + length]
            start += length
            found.setdefault(index, {})[name] = values
            if index in parts:
                values.copy_(parts[index][name])
        dist.all_reduce(whole.view(torch.int64))  # one rank's bits and zeros; as floats -0.0 would become 0.0
        return found

    def summed(self, values: Tensor) -> Tensor:
        """The sum of all ranks' values, on the CPU, of the same shape on every rank; in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, value: float) -> float:
        """Of what every rank has."""
        if self.size == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    def said(self, value: T) -> list[T]:
        """What every rank said, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on every rank, by rank. An error of ours, or of a disk, is raised on all: the first rank's
        that has one, so that none goes on to what the others will not take part in."""
        result, refusal = None, None
        try:
            result = work()
        except (SapoError, OSError) as error:
            refusal = error
        said = self.said((result, refusal))
        if refusal := next((each for _, each in said if each is not None), None):
            raise refusal
        return [cast(T, each) for each, _ in said]

    def agreed(self, value: T) -> T:
        """What rank 0 said, on every rank."""
        if self.size == 1:
            return value
        found: list[Any] = [value]
        dist.broadcast_object_list(found, src=0)
        told: T = found[0]
        return told

    def decided(self, decide: Callable[[], T]) -> T:
        """What rank 0 alone finds out or does, on every rank. An error of ours, or of its disk, is raised on every
        rank."""
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = decide()
            except (SapoError, OSError) as error:
                found[1] = error
        result, refusal = self.agreed(found)
        if refusal is not None:
            if not self.first:
                refusal.add_note(SAID)
            raise refusal
        told: T = result
        return told

    def awaited(self, decide: Callable[[], T]) -> T:
        """The same for what may take long: rank 0 does it in a thread and tells the others now and then to wait on."""
        if self.size == 1:
            return decide()
        if not self.first:
            while not self.agreed(False):
                pass
            return self.decided(decide)
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(decide)
            while not self.agreed(bool(wait([found], TICK_SECONDS).done)):
                pass
            return self.decided(found.result)


ALONE = Ranks()


def launched() -> bool:
    """Whether torchrun has started this process, perhaps as the only rank."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def device_of_rank() -> torch.device:
    """The GPU that is this rank's, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun has started, this one among them; without torchrun a process group of this one alone."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if launched():
        shared, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
        own = dist.PrefixStore(_attempt(shared, rank, size), shared)  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=TIMEOUT, store=own, rank=rank, world_size=size)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=0, world_size=1)
    try:
        yield Ranks.of_process_group()
    finally:
        dist.destroy_process_group()


def _attempt(store: Any, rank: int, size: int) -> str:
    """A name for this start of the ranks, the same on all of them and never used before. store: a c10d Store.

    torchrun's store outlives the ranks that it starts again, and in it they would find each other's old addresses, and
    wait there for ever. So rank 0 makes up a name, the others sign it, each with one of its own, and believe in it once
    rank 0 has seen their signature.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", mine)
        signed = [store.get(f"{mine}/{other}").decode() for other in range(1, size)]
        store.set(f"{mine}/signed", " ".join(signed))
        return mine
    while True:
        name = str(store.get("attempt").decode())
        store.set(f"{name}/{rank}", mine)
        if store.check([f"{name}/signed"]) and mine in store.get(f"{name}/signed").decode().split():
            return name
        time.sleep(JOIN_SECONDS)


_LOST = ("gloo/transport", "Connection closed by peer", "NCCL", "Connection reset by peer", "Broken pipe")


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """Turn what torch raises when another rank is gone into Unavailable: this one is not to blame."""
    try:
        yield
    except RuntimeError as error:
        if ranks.size == 1 or not any(words in str(error) for words in _LOST):
            raise
        reason = shorten(str(error).splitlines()[0].partition(". This is")[0], 200, placeholder=" ...")
        gone = Unavailable(
            f"another rank of the learner is gone: {reason}",
            where=f"rank {ranks.rank} of {ranks.size}",
            fix="look for the rank that ended first; torchrun starts them all again from the newest checkpoint",
        )
        if not ranks.first:  # once is enough: many of these would bury what the one that is gone has said
            gone.add_note(SAID)
        raise gone from None
