"""A histogram for the hot path: one event loop counts, and nothing is added up before somebody asks.

`prometheus_client.Histogram` takes two locks and looks through its buckets one by one; at two observations a hop that
was an eighth of what a hop costs. What is exposed is the same, and so is the way to use it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Counts:
    """What one label's value has seen. Counted by one thread only, the event loop's; read by any."""

    __slots__ = ("_bounds", "buckets", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)  # each by itself; the last one is beyond every bound
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value; one that equals a bound lies below it."""
        self.buckets[bisect_left(self._bounds, value)] += 1
        self.total += value


class Histogram(Collector):
    """A histogram with one label."""

    def __init__(
        self,
        name: str,
        documentation: str,
        label: str,
        buckets: Sequence[float],
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._label = label
        self._bounds = tuple(map(float, buckets))
        self._names = [*map(floatToGoString, self._bounds), "+Inf"]
        self._of: dict[str, Counts] = {}
        registry.register(self)

    def labels(self, value: str) -> Counts:
        """Return what counts for one value of the label."""
        return self._of.setdefault(value, Counts(self._bounds))

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """Return the metric without its values: the registry asks so whether a name is taken."""
        return [HistogramMetricFamily(self._name, self._documentation, labels=[self._label])]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Return the metric, its buckets added up."""
        [family] = self.describe()
        for value, counts in self._of.items():
            total, buckets, sum_so_far = counts.total, list(counts.buckets), 0
            rows = []
            for name, count in zip(self._names, buckets, strict=True):
                sum_so_far += count
                rows.append((name, float(sum_so_far)))
            family.add_metric([value], rows, total)
        return [family]
