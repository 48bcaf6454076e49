"""Spans: one for each request, below its caller's, without what was said; and nothing at all unless asked for."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec, module_from_spec
from typing import Any

import pytest

from gapless.errors import ConfigError
from gapless.outputs import Usage
from gapless.server import telemetry
from gapless.server.observer import RequestRecord, ServerObserver
from gapless.server.telemetry import ENVIRONMENT, Spans

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.sdk.trace import ReadableSpan  # after the skip
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECOND = 10**9
RECORD: dict[str, Any] = {
    "request_id": "req-1",
    "endpoint": "/v1/chat/completions",
    "traceparent": None,
    "opened": 1_700_000_000.0,
    "reason": "stop",
    "usage": Usage(12, 5, cached_tokens=8),
    "tokens": 5,
    "ttft": 0.25,
    "seconds": 0.75,
}


def model_name() -> str:
    return "tiny"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def spans_of(**changes: Any) -> tuple[ReadableSpan, ...]:
    """What is sent for one request."""
    exporter = InMemorySpanExporter()
    spans = Spans(exporter, model_name)
    spans.ended(RequestRecord(**RECORD | changes))
    spans.close()
    return exporter.get_finished_spans()


def test_a_request_is_a_span_with_the_conventions_attributes():
    (span,) = spans_of()
    assert span.name == "chat tiny"
    assert span.kind is SpanKind.SERVER
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "gapless",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.id": "req-1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 0.25,
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.cache_read.input_tokens": 8,
        "gen_ai.usage.output_tokens": 5,
        "http.route": "/v1/chat/completions",
    }
    assert span.status.status_code is StatusCode.UNSET
    assert span.resource.attributes["service.name"] == "gapless"


def test_its_times_are_the_requests():
    (span,) = spans_of()
    begin = 1_700_000_000 * SECOND
    assert (span.start_time, span.end_time) == (begin, begin + SECOND * 3 // 4)
    assert [(event.name, event.timestamp) for event in span.events] == [("first_token", begin + SECOND // 4)]


def test_without_a_token_there_is_no_first_one():
    (span,) = spans_of(usage=None, tokens=0, ttft=None, reason="cancelled")
    assert not span.events
    assert "gen_ai.usage.input_tokens" not in (span.attributes or {})


def test_an_error_is_marked():
    (span,) = spans_of(reason="error")
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "error"


def test_it_stands_below_the_span_that_the_client_named():
    (span,) = spans_of(traceparent=f"00-{TRACE}-{PARENT}-01")
    assert span.parent is not None
    assert span.context is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)


def test_a_client_that_does_not_sample_its_trace_gets_no_span():
    assert spans_of(traceparent=f"00-{TRACE}-{PARENT}-00") == ()


@pytest.mark.parametrize("traceparent", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{PARENT}", "é\n"])
def test_a_parent_that_is_none_is_passed_over(traceparent: str):
    (span,) = spans_of(traceparent=traceparent)
    assert span.parent is None


def test_the_observer_tells_it_the_clients_parent_and_the_endpoint():
    exporter = InMemorySpanExporter()
    spans = Spans(exporter, model_name)
    observer = ServerObserver([spans])
    watch = observer.opened("req-1", "/v1/completions", traceparent=f"00-{TRACE}-{PARENT}-01")
    watch.tokens(1)
    watch.ended("length", Usage(3, 1))
    observer.refused("req-2", "/v1/completions", 429)
    spans.close()
    (span,) = exporter.get_finished_spans()
    assert span.name == "text_completion tiny"
    assert span.parent is not None
    assert abs((span.end_time or 0) - time.time_ns()) < 60 * SECOND


class Receiver(BaseHTTPRequestHandler):
    """Takes what comes, and remembers where it was to go."""

    paths: list[str]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.paths.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Says nothing."""


@pytest.fixture
def receiver() -> Iterator[HTTPServer]:
    Receiver.paths = []
    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("how", ["", "/", "/v1/traces", "environment"])
def test_spans_go_to_the_endpoint(receiver: HTTPServer, monkeypatch: pytest.MonkeyPatch, how: str):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    address = f"http://127.0.0.1:{receiver.server_port}"
    if how == "environment":
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        spans = Spans.to(None, model_name)
    else:
        spans = Spans.to(address + how, model_name)
    assert spans is not None
    spans.ended(RequestRecord(**RECORD))
    spans.close()
    assert Receiver.paths == ["/v1/traces"]


def test_a_receiver_that_is_not_there_does_not_hold_the_end(monkeypatch: pytest.MonkeyPatch):
    stuck = threading.Event()

    class Stuck(InMemorySpanExporter):
        def export(self, spans: Any) -> Any:
            stuck.wait(60)
            return super().export(spans)

    monkeypatch.setattr(telemetry, "CLOSE_SECONDS", 0.01)
    spans = Spans(Stuck(), model_name)
    spans.ended(RequestRecord(**RECORD))
    spans.close()
    assert "gapless-last-spans" in {thread.name for thread in threading.enumerate()}  # close() did not wait for it
    stuck.set()


def test_without_an_endpoint_nothing_of_it_is_imported(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    spec = find_spec(telemetry.__name__)
    assert spec is not None
    assert spec.loader is not None
    fresh = module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert fresh.Spans.to(None, model_name) is None
    assert not [name for name in sys.modules if name.startswith("opentelemetry")]


def test_an_endpoint_without_the_extra_is_a_wrong_option(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"extra otel"):
        Spans.to("http://localhost:4318", model_name)
