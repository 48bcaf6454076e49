"""What /metrics shows, for Prometheus: docs/grafana-dashboard.json draws it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gapless import __version__
from gapless.server.context import Context, LiveStats, UnavailableError
from gapless.server.latency import Latency
from gapless.server.observer import ServerObserver, observer_of
from gapless.server.readings import Totals

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def render(context: Context) -> bytes:
    """The text of /metrics. Without an engine that answers, what is known without it."""
    observer = observer_of(context)
    live: LiveStats | None = None
    with suppress(UnavailableError):
        live = await observer.engine.read(context.engines)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_ServerCollector(context, observer, live))
    return generate_latest(registry)


class _ServerCollector(Collector):
    """All families, each with the label model_name, at one moment."""

    def __init__(self, context: Context, observer: ServerObserver, live: LiveStats | None) -> None:
        self._context = context
        self._observer = observer
        self._live = live
        names = context.config.model_names
        self._model_name = names[0] if names else observer.engine.model_name

    def collect(self) -> Iterator[Metric]:
        context, observer = self._context, self._observer
        yield self._gauge("ready", "1 if requests are taken", context.engines.state == "ready" and not context.draining)
        yield self._gauge("requests_open", "Requests that are open, running or waiting", context.open)
        yield self._gauge("requests_open_limit", "The most that may be open", context.config.max_open)
        yield self._counts("requests", "Requests that ended", "finish_reason", observer.ended_total)
        yield self._counts(
            "requests_refused",
            "Requests that got an error in place of an answer",
            "status",
            {str(status): count for status, count in observer.refused_total.items()},
        )
        yield self._histogram("time_to_first_token_seconds", "From queueing to the first token", observer.ttft)
        yield self._histogram("inter_token_latency_seconds", "Between two tokens of a request", observer.inter_token)
        yield self._histogram("e2e_request_latency_seconds", "From queueing to the end of the answer", observer.e2e)
        yield self._count("engine_restarts", "Engines started in the place of a dead one", context.engines.restarts)
        yield from self._totals(observer.engine.totals)
        if self._live is not None:
            yield from self._gauges(self._live)
        yield self._info()

    def _totals(self, totals: Totals) -> Iterator[Metric]:
        yield self._count("steps", "Steps of the engine", totals.steps)
        yield self._count("failed_steps", "Steps that failed", totals.failed_steps)
        yield self._count("prompt_tokens", "Tokens of prompts", totals.prompt_tokens)
        yield self._count("generation_tokens", "Generated tokens", totals.generated_tokens)
        yield self._count("recomputed_tokens", "Tokens computed again after a preemption", totals.recomputed_tokens)
        yield self._count("prefix_cache_queries", "Prompt tokens, all looked up in the cache", totals.prompt_tokens)
        yield self._count("prefix_cache_hits", "Prompt tokens found in the prefix cache", totals.cached_tokens)
        yield self._count("preemptions", "Requests that had to give up their row", totals.preemptions)
        yield self._count("overshoot_rows", "Rows computed for requests that had ended", totals.overshoot_rows)
        yield self._count("gpu_busy_seconds", "Work of the compute stream", totals.busy_seconds)
        yield self._count("active_seconds", "Wall time with work for the engine", totals.active_seconds)
        yield self._count("host_seconds", "The host's own work in steps", totals.host_seconds)

    def _gauges(self, live: LiveStats) -> Iterator[Metric]:
        yield self._gauge("requests_running", "Requests that hold a row of the batch", live.running)
        yield self._gauge("requests_waiting", "Requests that wait for a row", live.waiting)
        yield self._gauge("rows", "The most requests that can run at once", live.rows)
        yield self._gauge("lookahead", "Steps queued before the oldest is read", live.lookahead)
        yield self._gauge("kv_blocks", "Blocks of the KV cache", live.kv_blocks)
        yield self._gauge("kv_usage_ratio", "Used share of the KV cache", live.kv_blocks_used / live.kv_blocks)
        yield self._gauge("seconds_since_progress", "Since the engine last went on", live.seconds_since_progress)
        rates = self._observer.engine.rates()
        if rates.busy_share is not None:
            yield self._gauge("gpu_busy_ratio", "Busy share of the time with work, of late", rates.busy_share)
        if rates.host_step_seconds is not None:
            yield self._gauge("host_step_seconds", "The host's own work for a step, of late", rates.host_step_seconds)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"gapless_{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _count(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"gapless_{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counts(self, name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
        family = CounterMetricFamily(f"gapless_{name}", text, labels=["model_name", label])
        for value, count in sorted(values.items()):
            family.add_metric([self._model_name, value], count)
        return family

    def _histogram(self, name: str, text: str, latency: Latency) -> Metric:
        buckets: list[tuple[str, float]] = []
        reached = 0
        for bound, count in zip((*latency.bounds, float("inf")), latency.counts, strict=True):
            reached += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), reached))
        family = HistogramMetricFamily(f"gapless_{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], buckets, latency.sum)
        return family

    def _info(self) -> Metric:
        family = GaugeMetricFamily("gapless_info", "1; its labels say what runs", labels=["model_name", "version"])
        family.add_metric([self._model_name, __version__], 1)
        return family
