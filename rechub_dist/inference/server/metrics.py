"""Prometheus metrics of a server."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from rechub_dist.inference.server.versions import Served

_SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_DIFFERENCES = (0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1)


class Metrics:
    """The metrics of what is served.

    Args:
        served: the bundles, shadows among them.
        waiting: returns the number of requests in the server.
    """

    def __init__(self, served: Iterable[Served], waiting: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "rechub_serving_requests", "Requests by answer", ["bundle", "operation", "code"], registry=registry
        )
        self.seconds = Histogram(
            "rechub_serving_seconds", "From a request's last byte to its answer", ["bundle", "operation"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.batch_rows = Histogram(
            "rechub_serving_batch_rows", "Rows scored at once", ["bundle"], buckets=_ROWS, registry=registry
        )
        self.batch_requests = Histogram(
            "rechub_serving_batch_requests", "Requests scored at once", ["bundle"], buckets=_ROWS, registry=registry
        )
        self.reloads = Counter(
            "rechub_serving_reloads", "Changes of version", ["bundle", "result"], registry=registry
        )  # result: loaded, unchanged, failed, rolled_back
        self.shadow_requests = Counter(
            "rechub_serving_shadow_requests", "Requests that a shadow got", ["bundle", "result"], registry=registry
        )  # result: compared, failed, dropped
        self.shadow_differences = Histogram(
            "rechub_serving_shadow_difference", "Largest difference of a request's scores from the answer's",
            ["bundle"], buckets=_DIFFERENCES, registry=registry,
        )  # fmt: skip
        queue = Gauge("rechub_serving_queue", "Requests that wait or are scored", registry=registry)
        queue.set_function(waiting)
        registry.register(_Versions(served))

    def text(self) -> bytes:
        """In the text format."""
        found: bytes = generate_latest(self.registry)
        return found


class _Versions(Collector):
    """Which version of each bundle answers."""

    def __init__(self, served: Iterable[Served]) -> None:
        self._served = tuple(served)

    def collect(self) -> Iterable[GaugeMetricFamily | InfoMetricFamily]:
        """The present values."""
        step = GaugeMetricFamily("rechub_serving_step", "Training step of what answers", labels=["bundle"])
        opened = GaugeMetricFamily("rechub_serving_opened_seconds", "When it was opened", labels=["bundle"])
        version = InfoMetricFamily("rechub_serving_version", "What answers", labels=["bundle"])
        for one in self._served:
            current = one.current
            step.add_metric([one.name], current.manifest.step)
            opened.add_metric([one.name], current.opened)
            version.add_metric([one.name], {"version": current.label, "model": current.manifest.model})
        return [step, opened, version]
