"""What /metrics shows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from radio_fast.serve.service import Service

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
COUNTERS = {
    "accepted": "images_accepted", "completed": "images_completed", "cancelled": "images_cancelled",
    "retried": "batches_retried", "out_of_memory": "batches_out_of_memory",
}  # fmt: skip
KINDS = {"failed": "images_failed", "rejected": "images_rejected"}
GAUGES = ("queue_depth", "tokens_in_flight", "token_budget")
HISTOGRAMS = {
    "decode_seconds": "image_decode_seconds", "wait_seconds": "image_wait_seconds",
    "compute_seconds": "image_compute_seconds", "total_seconds": "image_total_seconds",
    "batch_tokens": "batch_tokens", "batch_images": "batch_images",
}  # fmt: skip


class Prometheus:
    """Requests by path and status, and the embedder's own metrics, in a registry of its own.

    `paths`: those that exist; others are counted as "other", as a name that strangers choose would be without bound.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, service: Service):
        self.paths: frozenset[str] = frozenset()
        self._registry = CollectorRegistry()
        self._registry.register(_OfEmbedder(service))
        self._requests = Counter(
            "radio_fast_http_requests", "Requests answered.", ["path", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "radio_fast_http_request_seconds", "From a request's head to the end of its answer.", ["path"],
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip

    def observe(self, path: str, status: int, seconds: float) -> None:
        path = path if path in self.paths else "other"
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _OfEmbedder(Collector):
    """`radio_fast.serve.metrics.Snapshot` in Prometheus' terms, taken when asked for."""

    def __init__(self, service: Service):
        self._service = service

    def collect(self) -> Iterator[Metric]:
        service = self._service
        yield GaugeMetricFamily("radio_fast_ready", "1 where /health/ready says so.", service.why_not_ready is None)
        yield GaugeMetricFamily("radio_fast_http_requests_in_flight", "Requests worked on.", service.requests)
        if service.loaded is None:
            return
        snapshot = service.loaded.metrics.snapshot()
        for field, name in COUNTERS.items():
            yield CounterMetricFamily(f"radio_fast_{name}", f"Snapshot.{field}", getattr(snapshot, field))
        for field, name in KINDS.items():
            family = CounterMetricFamily(f"radio_fast_{name}", f"Snapshot.{field}", labels=["kind"])
            for kind, count in getattr(snapshot, field).items():
                family.add_metric([kind], count)
            yield family
        for field in GAUGES:
            yield GaugeMetricFamily(f"radio_fast_{field}", f"Snapshot.{field}", getattr(snapshot, field))
        for field, name in HISTOGRAMS.items():
            histogram = getattr(snapshot, field)
            bounds = [*map(str, histogram.bounds), "+Inf"]
            buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
            yield HistogramMetricFamily(f"radio_fast_{name}", f"Snapshot.{field}", buckets, histogram.sum)
