"""OpenTelemetry: a span for each request, sent over OTLP/HTTP. Needs the extra `otel`; off unless asked for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from gapless import __version__
from gapless.errors import ConfigError
from gapless.server.observer import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

ENVIRONMENT = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
CLOSE_SECONDS = 2.0
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
}


class Spans:
    """A Listener that makes a span of each request that was queued, by OpenTelemetry's conventions for generative AI.
    Spans hold nothing of what was said. Sending has a thread of its own.

    exporter    where spans go
    model_name  asked for at each request
    """

    def __init__(self, exporter: SpanExporter, model_name: Callable[[], str]) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        ours = Resource({SERVICE_NAME: "gapless", SERVICE_VERSION: __version__})
        self._provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("gapless", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._model_name = model_name

    @classmethod
    def to(cls, endpoint: str | None, model_name: Callable[[], str]) -> Self | None:
        """To this OTLP endpoint, as http://localhost:4318, or to the environment's; None if there is neither.

        Raises ConfigError without the extra `otel`.
        """
        if not (endpoint or any(os.environ.get(name) for name in ENVIRONMENT)):
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise ConfigError(
                "an OTLP endpoint needs OpenTelemetry: install Gapless with its extra otel (pip install '.[otel]')"
            ) from error
        return cls(OTLPSpanExporter(endpoint=endpoint and _traces_url(endpoint)), model_name)

    def ended(self, record: RequestRecord) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        operation, model = OPERATIONS.get(record.endpoint, "text_completion"), self._model_name()
        begin = int(record.opened * 1e9)
        span = self._tracer.start_span(
            f"{operation} {model}",
            self._propagator.extract({"traceparent": record.traceparent} if record.traceparent else {}),
            kind=SpanKind.SERVER,
            start_time=begin,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "gapless",
                "gen_ai.request.model": model,
                "gen_ai.response.model": model,
                "gen_ai.response.id": record.request_id,
                "gen_ai.response.finish_reasons": (record.reason,),
                "gen_ai.usage.output_tokens": record.usage.completion_tokens if record.usage else record.tokens,
                "http.route": record.endpoint,
            },
        )
        if record.usage is not None:
            span.set_attribute("gen_ai.usage.input_tokens", record.usage.prompt_tokens)
            span.set_attribute("gen_ai.usage.cache_read.input_tokens", record.usage.cached_tokens)
        if record.ttft is not None:
            span.set_attribute("gen_ai.response.time_to_first_chunk", record.ttft)
            span.add_event("first_token", timestamp=begin + int(record.ttft * 1e9))
        if record.reason == "error":
            span.set_attribute("error.type", "error")
            span.set_status(Status(StatusCode.ERROR))
        span.end(begin + int(record.seconds * 1e9))

    def refused(self, request_id: str, endpoint: str, status: int) -> None:
        """Has no span: it did nothing."""

    def close(self) -> None:
        """Send what is left, if the receiver takes it in time."""
        sending = threading.Thread(target=self._provider.shutdown, name="gapless-last-spans", daemon=True)
        sending.start()
        sending.join(CLOSE_SECONDS)


def _traces_url(endpoint: str) -> str:
    return endpoint if endpoint.endswith("/v1/traces") else f"{endpoint.rstrip('/')}/v1/traces"
