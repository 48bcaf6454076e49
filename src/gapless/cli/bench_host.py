"""`gapless bench host`, `soak` and `predict`: what needs no accelerator."""

from __future__ import annotations

import json
from itertools import product
from typing import Annotated

import typer

from gapless.cli import options
from gapless.cli.bench_options import Json, Lookahead
from gapless.cli.setup import say
from gapless.cli.targets import check_target, naming


def host(
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Running rows; repeatable. Default 32, 256, 1024.")
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens each row has; repeatable. Default 64, 8192, 131072.")
    ] = None,
    queue: Annotated[
        list[int] | None, typer.Option(min=0, help="Waiting requests; repeatable. Default 0 and 100000.")
    ] = None,
    steps: Annotated[int, typer.Option(min=10, help="Timed steps.")] = 500,
    lookahead: Lookahead = 1,
    json_output: Json = False,
) -> None:
    """Host time per decode step on a device that does nothing: plan, fill, launch calls, commit.

    blocks/step is what Python's allocator still holds after a step.
    """
    from gapless.bench.environment import quoted_with
    from gapless.bench.host import HostRow, as_json, host_environment, measure

    facts = host_environment()
    print(f"host time per decode step, lookahead {lookahead}\n{quoted_with(facts)}")
    print(f"{'batch':>6} {'context':>8} {'waiting':>8} {'us/step':>9} {'p99 us':>8} {'blocks/step':>12}", flush=True)
    rows: list[HostRow] = []
    for b, c in product(batch or [32, 256, 1024], context or [64, 8192, 131072]):
        say(f"{b} rows of {c} tokens ...")
        for row in measure(b, c, queue or [0, 100_000], steps=steps, lookahead=lookahead):
            rows.append(row)
            print(
                f"{row.batch:>6} {row.context:>8} {row.queue:>8} {row.us_per_step:>9} {row.us_p99:>8} "
                f"{row.allocations_per_step:>12}",
                flush=True,
            )
    if json_output:
        print(json.dumps(as_json(rows, facts)))


def soak(
    steps: Annotated[int, typer.Option(min=100, help="Steps, in 20 windows after one to warm up.")] = 100_000,
    rows: Annotated[int, typer.Option(min=1, help="Rows; three times as many requests are there at once.")] = 32,
    lookahead: Lookahead = 1,
    whole_path: Annotated[
        bool,
        typer.Option("--whole-path", help="Tasks, AsyncLLM, the engine's thread, and steps that run out of memory."),
    ] = False,
    json_output: Json = False,
) -> None:
    """A long run of requests that come, end, are cancelled and preempted: what the host keeps, and its time per step.

    On a device that does nothing. Tensors are those of host and device, pinned is what was ever lent. Without
    --whole-path the loop alone is stepped.
    """
    if whole_path:
        _soak_whole_path(steps, rows, lookahead, json_output)
        return
    from gapless.bench.soak import STEADY_STEPS, Soak, Window, as_json

    def show(done: int, window: Window) -> None:
        print(
            f"{done:>7} {window.wall_us:>7} {window.wall_us_p10:>6} {window.cpu_us:>6} {window.objects:>7} "
            f"{window.blocks:>8} {window.tensor_bytes:>7} {window.pinned_bytes:>7} "
            f"{window.resident_bytes / 2**20:>6.1f} MiB {window.cyclic:>6}",
            flush=True,
        )

    print(
        f"{'steps':>7} {'us/step':>7} {'p10 us':>6} {'CPU us':>6} {'objects':>7} {'blocks':>8} {'tensors':>7} "
        f"{'pinned':>7} {'resident':>10} {'cyclic':>6}",
        flush=True,
    )
    report = Soak.build(rows, lookahead).run(steps, each=show)
    ended = ", ".join(f"{count} {reason.value}" for reason, count in report.ended.items())
    print(f"requests ended: {ended}; {report.stats.preemptions} preemptions")
    print(
        f"{report.growth_text()}; time end/start: {report.ratio('wall_us'):.3f}, "
        f"p10 {report.ratio('wall_us_p10'):.3f}, CPU {report.ratio('cpu_us'):.3f}; function calls per decode step: "
        f"{report.calls_before / STEADY_STEPS:.2f} before, {report.calls_after / STEADY_STEPS:.2f} after"
    )
    if json_output:
        print(json.dumps(as_json(report)))


def _soak_whole_path(steps: int, rows: int, lookahead: int, json_output: bool) -> None:
    from gapless.bench.soak_requests import RequestSoak, RequestWindow, as_json

    def show(done: int, window: RequestWindow) -> None:
        print(
            f"{done:>7} {window.wall_us:>7} {window.cpu_us:>6} {window.objects:>7} {window.blocks:>8} "
            f"{window.tensor_bytes:>7} {window.pinned_bytes:>7} {window.resident_bytes / 2**20:>6.1f} MiB "
            f"{window.cyclic:>6} {window.left:>5}",
            flush=True,
        )

    print(
        f"{'steps':>7} {'us/step':>7} {'CPU us':>6} {'objects':>7} {'blocks':>8} {'tensors':>7} {'pinned':>7} "
        f"{'resident':>10} {'cyclic':>6} {'left':>5}",
        flush=True,
    )
    report = RequestSoak(rows, lookahead).run(steps, each=show)
    did = ", ".join(f"{way} {count}" for way, count in sorted(report.ended.items()))
    stats = report.stats
    print(f"requests: {did}; {stats.preemptions} preemptions, {stats.failed_steps} steps out of memory")
    print(report.growth_text())
    if json_output:
        print(json.dumps(as_json(report)))


def predict(
    host_us: Annotated[list[float], typer.Option(min=0.0, help="What a step costs the host; repeatable.")],
    device_us: Annotated[float, typer.Option(min=1e-3, help="What a step costs the device.")],
    lookahead: Annotated[list[int] | None, typer.Option(help="Steps ahead; repeatable. Default 0, 1, 2.")] = None,
    copy_us: Annotated[float, typer.Option(min=0.0, help="What each of a step's two copies costs.")] = 0.0,
    jitter: Annotated[
        float, typer.Option(min=0.0, max=3.0, help="How the host's cost varies: standard deviation over mean.")
    ] = 0.0,
    steps: Annotated[int, typer.Option(min=10, help="Steps to simulate.")] = 500,
    trace: options.Trace = None,
    json_output: Json = False,
) -> None:
    """Predict the device's idle share from what a step costs: the real loop in virtual time, no device needed."""
    from gapless.bench.predict import Prediction, as_json
    from gapless.bench.predict import predict as predict_one
    from gapless.trace.record import write_trace

    if trace is not None:
        check_target(trace, "trace")
    print(f"{'host us':>9} {'device us':>10} {'lookahead':>10} {'us/step':>9} {'idle':>7}", flush=True)
    results: list[Prediction] = []
    for us, ahead in product(host_us, lookahead or [0, 1, 2]):
        result = predict_one(
            ahead, host=us * 1e-6, device=device_us * 1e-6, copy=copy_us * 1e-6, jitter=jitter, steps=steps
        )
        results.append(result)
        print(
            f"{us:>9.1f} {device_us:>10.1f} {ahead:>10} {result.step_seconds * 1e6:>9.1f} {result.idle_share:>7.1%}",
            flush=True,
        )
    if trace is not None:
        with naming(trace):
            write_trace(trace, [result.run for result in results])
    if json_output:
        print(json.dumps(as_json(results)))
