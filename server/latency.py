"""Histograms whose observation costs half a microsecond, since every batch makes five.

``prometheus_client.Histogram`` costs four times as much, most of it for the locks of values that other processes could
share; here one lock guards all, and the buckets are added up when they are read.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily
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
    """

    def __init__(
        self,
        name: str,
        text: str,
        label: str,
        values: Sequence[str],
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._text, self._label = name, text, label
        self._bounds = tuple(buckets)
        self._lock = threading.Lock()
        self._counts = {value: [0] * (len(self._bounds) + 1) for value in values}
        self._sums = dict.fromkeys(values, 0.0)
        self._exemplars: dict[tuple[str, int], tuple[str, float, float]] = {}
        registry.register(self)

    def observe(self, value: str, seconds: float, trace_id: str | None = None) -> None:
        """Count ``seconds`` under a label's value; a trace becomes the exemplar of the bucket that it fell into."""
        place = bisect_left(self._bounds, seconds)
        with self._lock:
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
