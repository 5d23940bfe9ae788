"""Metrics that every batch adds to: plain numbers, which one lock guards for all of them.

``prometheus_client`` locks each value for itself, and asks of each first whether it may be added to: fifteen calls for
a batch whose weights have just driven their code out of the caches. Here a batch takes the lock once, and buckets are
added up when they are read.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from threading import Lock

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString


class Latency(Collector):
    """A histogram of seconds with one label, of which every value exists from the start.

    Parameters
    ----------
    name, text : str
        Of the metric.
    label : str
        The label's name.
    values : sequence of str
        The label's values.
    buckets : sequence of float
        Upper bounds in seconds, ascending, without infinity.
    registry : CollectorRegistry
    lock : Lock
        Held by whoever calls :meth:`note`.
    """

    def __init__(
        self,
        name: str,
        text: str,
        label: str,
        values: Sequence[str],
        buckets: Sequence[float],
        registry: CollectorRegistry,
        lock: Lock,
    ) -> None:
        self._name, self._text, self._label = name, text, label
        self._bounds = tuple(buckets)
        self._lock = lock
        self._counts = {value: [0] * (len(self._bounds) + 1) for value in values}
        self._sums = dict.fromkeys(values, 0.0)
        self._exemplars: dict[tuple[str, int], tuple[str, float, float]] = {}
        registry.register(self)

    def note(self, value: str, seconds: float, trace_id: str | None = None) -> None:
        """Count ``seconds`` under a label's value; a trace becomes the exemplar of the bucket that it fell into."""
        place = bisect_left(self._bounds, seconds)
        self._counts[value][place] += 1
        self._sums[value] += seconds
        if trace_id is not None:
            self._exemplars[value, place] = (trace_id, seconds, time.time())

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """What Prometheus reads: counts added up, from bucket to bucket."""
        with self._lock:
            counts = {value: list(found) for value, found in self._counts.items()}
            sums, exemplars = dict(self._sums), dict(self._exemplars)
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label])
        for value, found in counts.items():
            total = 0
            rows: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
            for place, bound in enumerate((*self._bounds, float("inf"))):
                total += found[place]
                bound_text: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
                seen = exemplars.get((value, place))
                exemplar = () if seen is None else (Exemplar({"trace_id": seen[0]}, *seen[1:]),)
                rows.append((bound_text, total, *exemplar))
            family.add_metric([value], rows, sums[value])
        yield family


class Totals(Collector):
    """A counter: what was added up under each set of labels.

    Parameters
    ----------
    name, text : str
        Of the metric, without ``_total``.
    labels : sequence of str
        The labels' names.
    registry : CollectorRegistry
    lock : Lock
        Held by whoever changes :attr:`values`.

    Attributes
    ----------
    values : dict of tuple of str to float
        The total of each set of labels.
    """

    def __init__(self, name: str, text: str, labels: Sequence[str], registry: CollectorRegistry, lock: Lock) -> None:
        self._name, self._text, self._labels = name, text, tuple(labels)
        self._lock = lock
        self.values: dict[tuple[str, ...], float] = {}
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """What Prometheus reads."""
        with self._lock:
            values = dict(self.values)
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in values.items():
            family.add_metric(labels, value)
        yield family
