"""What a step costs, phase by phase: wall seconds and memory.

    with phases("forward"): ...     a phase within another takes its time from that one
    phases.taken()                  everything since it was last asked

Phases of a step, in the training thread. What is in none of them is OTHER, so that all add up to the wall time.

    read        waiting for entries and reading them
    decode      entries to groups
    collate     advantages, packing
    forward     through the model; also what looks ahead, and through the reference policy
    loss        objective, filters, weights, diagnostics, and what ranks tell each other of them
    backward    through the model
    optimizer   clipping and the update
    checkpoint, snapshot    where one was due; the snapshot is the copy that is published, with its probe

Beside them, in other threads (BESIDE): archive, publish. They take no time from a step, so they do not add up with it.

On a GPU time is the stream's, between two events, not that of the calls that only queue work; `taken` waits for the
last event, so a step ends when the GPU has done it. Measured on a CPU: 0.03 ms for each phase of each microbatch.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

OTHER = "other"
UPDATE = ("forward", "loss", "backward", "optimizer")
BESIDE = ("archive", "publish")


@dataclass(frozen=True)
class Costs:
    seconds: Mapping[str, float]
    """Phase -> wall seconds."""
    memory_bytes: Mapping[str, int]
    """Phase -> on a GPU the most that was allocated on it during the phase; on a CPU the process' resident memory at
    its end, the largest of several."""

    def __add__(self, later: "Costs") -> "Costs":
        seconds = {**self.seconds}
        for phase, spent in later.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
        memory = {**self.memory_bytes}
        for phase, held in later.memory_bytes.items():
            memory[phase] = max(memory.get(phase, 0), held)
        return Costs(seconds, memory)

    @property
    def update_seconds(self) -> float:
        """Of computing the update, without waiting for data and saving what came of it."""
        return sum(self.seconds.get(phase, 0.0) for phase in UPDATE)


class Phases:
    """Used by one thread, the one that trains."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        """device: that the model is on. clock: in seconds; not used on a GPU."""
        self._gpu = device if device.type == "cuda" else None
        self._clock, self._process = clock, psutil.Process()
        self._open = [OTHER]
        self._begun: list[tuple[str, float | torch.cuda.Event]] = [(OTHER, self._now())]
        self._memory: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._note_memory()
        self._open.append(name)
        self._begun.append((name, self._now()))
        try:
            yield
        finally:
            self._note_memory()
            self._open.pop()
            self._begun.append((self._open[-1], self._now()))

    def taken(self) -> Costs:
        """Everything since it was last asked, or since the beginning. On a GPU waits until it has done it."""
        end = self._now()
        if isinstance(end, torch.cuda.Event):
            end.synchronize()
        self._note_memory()
        seconds: dict[str, float] = defaultdict(float)
        ends = [mark for _, mark in self._begun[1:]] + [end]
        for (name, begun), ended in zip(self._begun, ends, strict=True):
            seconds[name] += _between(begun, ended)
        costs = Costs(dict(seconds), self._memory)
        self._begun, self._memory = [(self._open[-1], end)], {}
        return costs

    def _now(self) -> float | torch.cuda.Event:
        if self._gpu is None:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._gpu))
        return event

    def _note_memory(self) -> None:
        """Of the phase that ends, or makes way for one within it."""
        phase = self._open[-1]
        if self._gpu is not None:
            held = torch.cuda.max_memory_allocated(self._gpu)
            torch.cuda.reset_peak_memory_stats(self._gpu)
        elif phase == OTHER:  # asking costs more than the time in between is worth
            return
        else:
            held = self._process.memory_info().rss
        self._memory[phase] = max(self._memory.get(phase, 0), held)


def _between(begun: float | torch.cuda.Event, ended: float | torch.cuda.Event) -> float:
    if isinstance(begun, torch.cuda.Event):
        return float(begun.elapsed_time(ended)) / 1000  # type: ignore[arg-type]
    assert not isinstance(ended, torch.cuda.Event)
    return ended - begun
