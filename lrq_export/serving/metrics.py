"""What the server counts, as Prometheus reads it."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client import generate_latest as page_of

from lrq_export.serving.admission import Admission

# Seconds. A denoising step takes milliseconds on a small model, and minutes on a video model without a GPU.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
# Every kind of failure from the start: a rate over a series that appears with its first failure misses that one.
REASONS = ("invalid", "too large", "busy", "slow", "gone", "failed", "unread")


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, admission: Admission):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("lrq_requests", "Infer requests that arrived.", registry=registry)
        self.answered = Counter("lrq_answered", "Infer requests answered with tensors.", registry=registry)
        self.failures = Counter("lrq_failures", "Infer requests answered otherwise.", ["reason"], registry=registry)
        for reason in REASONS:
            self.failures.labels(reason)
        self.request_seconds = Histogram(
            "lrq_request_seconds", "From arrival to answer, of answered requests.", buckets=BUCKETS, registry=registry
        )
        self.run_seconds = Histogram(
            "lrq_run_seconds", "In the session alone.", buckets=BUCKETS, registry=registry
        )  # fmt: skip
        Gauge("lrq_queue_depth", "Requests that arrive or wait.", registry=registry).set_function(
            lambda: admission.waiting
        )
        Gauge("lrq_running", "Requests in the session.", registry=registry).set_function(lambda: admission.running)
        ProcessCollector(registry=registry)

    def render(self) -> tuple[str, bytes]:
        """Content type and page."""
        return CONTENT_TYPE_LATEST, page_of(self.registry)
