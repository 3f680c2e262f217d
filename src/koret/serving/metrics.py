"""What a server counts, for Prometheus: requests, texts, tokens, batches, the queue, how long answers take."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from koret.retrieval.microbatch import Batch

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self, model: str, count_waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("koret_requests", "requests to /v1/embeddings by HTTP status", ["status"], **own)
        self.texts = Counter("koret_texts", "texts answered", ["input_type"], **own)
        self.tokens = Counter("koret_tokens", "tokens of the texts answered, prefix included", ["input_type"], **own)
        self.clipped = Counter("koret_texts_at_limit", "texts that fill the model's window: most were cut there", **own)
        self.seconds = Histogram(
            "koret_request_seconds", "from a whole request to its answer", buckets=SECONDS, **own
        )  # fmt: skip
        self.batch_texts = Histogram("koret_batch_texts", "texts encoded together", buckets=SIZES, **own)
        self.batch_tokens = Histogram(
            "koret_batch_tokens", "tokens encoded together", buckets=[16 * size for size in SIZES], **own
        )
        self.batch_seconds = Histogram("koret_batch_seconds", "encoding one batch", buckets=SECONDS, **own)
        Gauge("koret_queue_texts", "texts accepted and not yet begun", **own).set_function(count_waiting)
        Gauge("koret_model_info", "always 1; the label names the model", ["model"], **own).labels(model).set(1)

    def count_batch(self, batch: Batch) -> None:
        self.batch_texts.observe(batch.texts)
        self.batch_tokens.observe(batch.tokens)
        self.batch_seconds.observe(batch.seconds)

    def format(self) -> bytes:
        """The text Prometheus reads."""
        return generate_latest(self.registry)
