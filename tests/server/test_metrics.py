"""/metrics: requests counted and timed, and the engine's figures, which outlive the engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from gapless.outputs import Usage
from gapless.server import metrics, readings
from gapless.server.config import ServerConfig
from gapless.server.context import Context, LiveStats
from gapless.server.latency import SLICE_SECONDS, WINDOW_SECONDS, Latency
from gapless.server.observer import ServerObserver
from support.engine_source import BUSY, QUIET, Clock, FakeEngines, context_of

OWED = {
    "gapless_requests_running",
    "gapless_requests_waiting",
    "gapless_requests",
    "gapless_requests_refused",
    "gapless_requests_open",
    "gapless_kv_usage_ratio",
    "gapless_prefix_cache_queries",
    "gapless_prefix_cache_hits",
    "gapless_prompt_tokens",
    "gapless_generation_tokens",
    "gapless_time_to_first_token_seconds",
    "gapless_inter_token_latency_seconds",
    "gapless_e2e_request_latency_seconds",
    "gapless_preemptions",
    "gapless_gpu_busy_ratio",
    "gapless_host_step_seconds",
    "gapless_overshoot_rows",
    "gapless_engine_restarts",
}


def scrape(context: Context) -> dict[str, Metric]:
    text = asyncio.run(metrics.render(context)).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(context: Context, name: str, **labels: str) -> float:
    for family in scrape(context).values():
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    raise AssertionError(f"no {name} {labels}")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def observer(clock: Clock) -> ServerObserver:
    return ServerObserver(clock=clock)


@pytest.fixture
def engines() -> FakeEngines:
    return FakeEngines()


@pytest.fixture
def context(engines: FakeEngines, observer: ServerObserver) -> Context:
    return context_of(engines, observer)


def test_what_is_owed_is_there_under_our_name_with_the_models(context: Context):
    families = scrape(context)
    assert set(families) >= OWED
    for family in families.values():
        assert family.name.startswith("gapless_")
        assert family.documentation
        assert all(sample.labels["model_name"] == "tiny" for sample in family.samples)


def test_the_global_registry_is_left_alone(context: Context):
    scrape(context)
    assert not [name for name in REGISTRY._names_to_collectors if name.startswith("gapless")]  # pyright: ignore[reportPrivateUsage]


def test_the_name_that_clients_use_is_the_label(engines: FakeEngines, observer: ServerObserver):
    named = ServerObserver()
    context = context_of(engines, named, ServerConfig(model_names=("big", "other")))
    assert value(context, "gapless_requests_running", model_name="big") == 6


def test_a_request_is_counted_by_how_it_ended_and_timed_by_its_tokens(
    context: Context, observer: ServerObserver, clock: Clock
):
    watch = observer.opened("a", "/v1/completions")
    clock.now += 0.2
    watch.tokens(1)
    for _ in range(3):
        clock.now += 0.004
        watch.tokens(1)
    watch.ended("stop", Usage(5, 4))
    assert value(context, "gapless_requests_total", finish_reason="stop") == 1
    assert value(context, "gapless_requests_total", finish_reason="length") == 0
    assert value(context, "gapless_time_to_first_token_seconds_bucket", le="0.1") == 0
    assert value(context, "gapless_time_to_first_token_seconds_bucket", le="0.25") == 1
    assert value(context, "gapless_inter_token_latency_seconds_bucket", le="0.003") == 0
    assert value(context, "gapless_inter_token_latency_seconds_bucket", le="0.005") == 3
    assert value(context, "gapless_inter_token_latency_seconds_sum") == pytest.approx(0.012)
    assert value(context, "gapless_e2e_request_latency_seconds_count") == 1
    assert value(context, "gapless_e2e_request_latency_seconds_sum") == pytest.approx(0.212)


def test_tokens_that_come_together_share_the_time(context: Context, observer: ServerObserver, clock: Clock):
    watch = observer.opened("a", "/v1/completions")
    watch.tokens(7)
    clock.now += 0.04
    watch.tokens(4)
    watch.tokens(0)
    assert value(context, "gapless_inter_token_latency_seconds_count") == 4
    assert value(context, "gapless_inter_token_latency_seconds_bucket", le="0.0075") == 0
    assert value(context, "gapless_inter_token_latency_seconds_bucket", le="0.01") == 4


def test_an_answer_that_comes_as_a_whole_is_timed_by_its_first_and_last_token(
    context: Context, observer: ServerObserver, clock: Clock
):
    watch = observer.opened("a", "/v1/completions")
    clock.now += 1.0
    watch.tokens(5, 0, (clock.now - 0.8, clock.now - 0.4))
    assert value(context, "gapless_time_to_first_token_seconds_sum") == pytest.approx(0.2)
    assert value(context, "gapless_inter_token_latency_seconds_count") == 4
    assert value(context, "gapless_inter_token_latency_seconds_sum") == pytest.approx(0.4)
    observer.opened("b", "/v1/completions").tokens(1, 0, (clock.now, clock.now))
    assert value(context, "gapless_time_to_first_token_seconds_count") == 2
    assert value(context, "gapless_inter_token_latency_seconds_count") == 4


def test_tokens_of_several_continuations_have_each_the_time_since_its_own_last(
    context: Context, observer: ServerObserver, clock: Clock
):
    watch = observer.opened("a", "/v1/completions")
    for _ in range(3):
        clock.now += 0.1
        for of in range(8):
            watch.tokens(1, of)
    assert value(context, "gapless_time_to_first_token_seconds_count") == 1
    assert value(context, "gapless_inter_token_latency_seconds_count") == 16
    assert value(context, "gapless_inter_token_latency_seconds_sum") == pytest.approx(1.6)


@pytest.mark.parametrize("reason", ["cancelled", "error"])
def test_a_request_without_an_answer_has_no_latency_and_ends_once(
    context: Context, observer: ServerObserver, reason: str
):
    watch = observer.opened("a", "/v1/completions")
    assert observer.open == 1
    watch.ended(reason, None)
    watch.ended("stop", None)
    assert observer.open == 0
    assert value(context, "gapless_requests_total", finish_reason=reason) == 1
    assert value(context, "gapless_requests_total", finish_reason="stop") == 0
    assert value(context, "gapless_e2e_request_latency_seconds_count") == 0


def test_refusals_are_counted_by_status(context: Context, observer: ServerObserver):
    for status in (429, 429, 413):
        observer.refused("a", "/v1/completions", status)
    assert value(context, "gapless_requests_refused_total", status="429") == 2
    assert value(context, "gapless_requests_refused_total", status="413") == 1
    assert value(context, "gapless_requests_refused_total", status="503") == 0


def test_a_probe_that_hears_no_is_no_refused_request(context: Context, observer: ServerObserver):
    observer.refused("a", "/ready", 503)
    assert value(context, "gapless_requests_refused_total", status="503") == 0


def test_the_engines_figures_are_those_of_now(context: Context, engines: FakeEngines):
    context.open = 9
    for name, expected in {
        "gapless_requests_running": 6,
        "gapless_requests_waiting": 2,
        "gapless_requests_open": 9,
        "gapless_kv_usage_ratio": 0.25,
        "gapless_prefix_cache_queries_total": 400,
        "gapless_prefix_cache_hits_total": 100,
        "gapless_generation_tokens_total": 300,
        "gapless_gpu_busy_ratio": 0.75,
        "gapless_host_step_seconds": 0.005,
        "gapless_ready": 1,
    }.items():
        assert value(context, name) == pytest.approx(expected), name
    context.draining = True
    assert value(context, "gapless_ready") == 0


@pytest.mark.parametrize("steps", [20, 50, 4000], ids=["less", "as far", "further"])
def test_counters_go_on_when_another_engine_takes_over(
    context: Context, engines: FakeEngines, clock: Clock, steps: int
):
    before = value(context, "gapless_generation_tokens_total")
    clock.now += 1
    engines.restart(replace(QUIET, steps=steps, generated_tokens=2 * steps))
    assert value(context, "gapless_generation_tokens_total") == before + 2 * steps
    assert value(context, "gapless_steps_total") == BUSY.steps + steps
    assert value(context, "gapless_engine_restarts_total") == 1
    clock.now += 1
    engines.now = replace(engines.now, steps=steps + 1)
    assert value(context, "gapless_steps_total") == BUSY.steps + steps + 1
    assert value(context, "gapless_engine_restarts_total") == 1


def test_an_engine_that_begins_anew_behind_the_same_name_is_noticed(
    context: Context, engines: FakeEngines, clock: Clock
):
    scrape(context)
    clock.now += 1
    engines.now = replace(QUIET, steps=1)
    assert value(context, "gapless_steps_total") == BUSY.steps + 1
    assert value(context, "gapless_generation_tokens_total") == BUSY.generated_tokens


def test_without_an_engine_the_counters_stay_and_what_is_of_the_moment_goes(
    context: Context, engines: FakeEngines, clock: Clock
):
    scrape(context)
    clock.now += 1
    engines.state = "restarting"
    families = scrape(context)
    assert families["gapless_steps"].samples[0].value == BUSY.steps
    assert families["gapless_ready"].samples[0].value == 0
    assert "gapless_requests_running" not in families


def test_an_engine_that_does_not_answer_does_not_hold_the_metrics(
    context: Context, engines: FakeEngines, monkeypatch: pytest.MonkeyPatch
):
    async def silent() -> LiveStats:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(readings, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(engines, "stats", silent)
    assert "gapless_requests" in scrape(context)


def test_many_who_ask_at_once_are_one_question_to_the_engine(context: Context, engines: FakeEngines, clock: Clock):
    async def ask() -> None:
        await asyncio.gather(*(metrics.render(context) for _ in range(20)))
        assert engines.questions == 1
        clock.now += 1
        await asyncio.gather(*(metrics.render(context) for _ in range(20)))
        assert engines.questions == 2

    asyncio.run(ask())


def test_all_who_ask_are_told_why_there_is_no_engine(engines: FakeEngines, observer: ServerObserver):
    async def ask() -> list[object]:
        return await asyncio.gather(*(observer.engine.read(engines) for _ in range(3)), return_exceptions=True)

    engines.state = "starting"
    assert [str(error) for error in asyncio.run(ask())] == ["the model is being loaded"] * 3


def test_rates_are_of_the_last_ten_seconds(context: Context, engines: FakeEngines, clock: Clock):
    scrape(context)
    for second in range(1, 31):
        clock.now += 1
        engines.now = replace(BUSY, steps=50 + 10 * second, active_seconds=2.0 + second, busy_seconds=1.5 + second)
        scrape(context)
    assert value(context, "gapless_gpu_busy_ratio") == pytest.approx(1.0)
    assert value(context, "gapless_host_step_seconds") == 0
    clock.now += 60
    scrape(context)
    assert "gapless_gpu_busy_ratio" not in scrape(context)


@pytest.mark.parametrize("median", [0.0004, 0.02, 3.0])
def test_percentiles_are_right_to_two_percent(median: float):
    latency, seconds = Latency([1.0]), np.random.default_rng(7).lognormal(np.log(median), 0.5, 5000)
    for each in seconds:
        latency.add(float(each), 1, now=5.0)
    assert latency.percentiles(5.0) == pytest.approx(tuple(np.quantile(seconds, (0.5, 0.99))), rel=0.03)


def test_percentiles_forget_what_is_older_than_the_window_and_counts_do_not():
    latency = Latency([1.0])
    assert latency.percentiles(0.0) == (None, None)
    latency.add(0.5, 10, now=3.0)
    latency.add(0.01, 30, now=63.0)
    assert latency.percentiles(63.0).p99 == pytest.approx(0.5, rel=0.03)
    assert latency.percentiles(3.0 + WINDOW_SECONDS + SLICE_SECONDS).p99 == pytest.approx(0.01, rel=0.03)
    assert latency.percentiles(200.0) == (None, None)
    assert latency.counts == [40, 0]


def test_a_duration_belongs_to_the_bucket_that_it_ends():
    latency = Latency([0.1, 1.0])
    for seconds in (0.05, 0.1, 0.11, 1.0, 5000.0):
        latency.add(seconds, 1, now=1.0)
    assert latency.counts == [2, 2, 1]
    assert latency.percentiles(1.0).p99 == pytest.approx(970, rel=0.1)  # the longest that percentiles know
