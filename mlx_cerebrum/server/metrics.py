"""What /metrics tells Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mlx_cerebrum.server.jobs import Engine

_FIRST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_EACH = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """A registry of its own: two servers in a process don't share their numbers."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.requests = Counter(
            "cerebrum_requests",
            "Requests by route and status (499: the client went away first)",
            ["route", "status"],
            registry=self._registry,
        )
        self.first_token_seconds = Histogram(
            "cerebrum_first_token_seconds",
            "From a request's arrival in the queue to its first token",
            buckets=_FIRST,
            registry=self._registry,
        )
        self.token_seconds = Histogram(
            "cerebrum_token_seconds",
            "Between two tokens of a choice",
            buckets=_EACH,
            registry=self._registry,
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        return []  # asked for at registration, when the engine may not have started

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        gauges = {
            "queued": ("Jobs waiting", stats.queued),
            "active": ("Sequences being generated", stats.active),
            "prefix_cache_bytes": ("Held for prompts that begin alike", stats.cache_bytes),
            "kv_bytes": ("Held by the sequences being generated", stats.kv_bytes),
            "weights_bytes": ("Held by weights", stats.weights_bytes),
            "checkpoints_loaded": ("Checkpoints whose weights are held", stats.loaded),
            "checkpoints_at_rest": ("Checkpoints that the next request loads", stats.at_rest),
            "short_of_memory": ("Whether the machine runs short of it", stats.short_of_memory),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"cerebrum_{name}", text, value)
        counters = {
            "prompt_tokens": ("Prompt tokens, cached ones too", stats.prompt_tokens),
            "cached_tokens": (
                "Prompt tokens that were kept of earlier prompts",
                stats.cached_tokens,
            ),
            "generated_tokens": ("Tokens generated", stats.generated_tokens),
            "loads": ("Checkpoints loaded since the start", stats.loads),
            "rests": ("Checkpoints put to rest for want of work", stats.rests),
            "reliefs": ("Times kept prompts were given up for want of memory", stats.reliefs),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"cerebrum_{name}", text, value)
        jobs = CounterMetricFamily("cerebrum_jobs", "Jobs by how they ended", labels=["how"])
        for how, count in stats.finished.items():
            jobs.add_metric([how], count)
        yield jobs
