"""Builds what `metric_definitions` defines for a process, with every label value that is known beforehand.

So a counter is there, at 0, before it first counts: `increase()` sees its first event, and no rule waits for a series.
"""

import itertools
import math
from collections.abc import Iterable
from typing import Any, ClassVar

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.runtime import watched
from services.runtime.metric_definitions import METRICS, OTHER, Definition, Service

MAX_LENGTH = 200  # of a label's value that somebody else decides

# When a series began is asked for by nobody, and would be a third of all series.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """Base of each process' metrics."""

    service: ClassVar[Service]

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._built = {each.name: _built(each, self.registry) for each in METRICS[self.service]}
        self._gauge("sapo_unusable_secret_files").set_function(lambda: len(watched.unusable()))

    def include(self, prefix: str) -> None:
        """Serve, beside our own, what a library keeps in the client's global registry under such names."""
        self.registry.register(_FromLibrary(prefix))

    def _gauge(self, name: str) -> Gauge:
        found = self._built[name]
        assert isinstance(found, Gauge), name
        return found

    def _counter(self, name: str) -> Counter:
        found = self._built[name]
        assert isinstance(found, Counter), name
        return found

    def _histogram(self, name: str) -> Histogram:
        found = self._built[name]
        assert isinstance(found, Histogram), name
        return found


class _FromLibrary(Collector):
    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def collect(self) -> Iterable[Metric]:
        return [each for each in REGISTRY.collect() if each.name.startswith(self._prefix)]


class Bounded:
    """A gauge whose label values others decide: so many different ones, and all that come later are "other"."""

    def __init__(self, gauge: Gauge, most: int) -> None:
        self._gauge, self._most = gauge, most
        self._known: set[tuple[str, ...]] = set()

    def labels(self, *values: str) -> Gauge:
        values = tuple(each if len(each) <= MAX_LENGTH and each.isprintable() else OTHER for each in values)
        if values not in self._known and len(self._known) >= self._most:
            values = (OTHER,) * len(values)
        else:
            self._known.add(values)
        return self._gauge.labels(*values)


def _built(metric: Definition, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    labels = list(metric.labels)
    made: Counter | Gauge | Histogram
    if metric.kind == "histogram":
        made = Histogram(metric.name, metric.help, labels, registry=registry, buckets=metric.buckets)
    else:
        made = (Counter if metric.kind == "counter" else Gauge)(metric.name, metric.help, labels, registry=registry)
    known = [each for each in metric.labels.values() if not isinstance(each, str)]
    if len(known) == len(labels):
        children: list[Any] = [made.labels(*each) for each in itertools.product(*known)] if labels else [made]
        for child in children if metric.unknown else []:
            child.set(math.nan)
    return made
