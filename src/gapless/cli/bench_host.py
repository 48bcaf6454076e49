"""`gapless bench host`, `soak` and `predict`: what needs no accelerator."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gapless.cli import options
from gapless.cli.bench_options import Json, Lookahead
from gapless.cli.timeline import check_target


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
    from gapless.bench.environment import header
    from gapless.bench.host import as_json, host_environment, measure

    rows = [
        row
        for b in batch or [32, 256, 1024]
        for c in context or [64, 8192, 131072]
        for row in measure(b, c, queue or [0, 100_000], steps=steps, lookahead=lookahead)
    ]
    facts = host_environment()
    print(header(f"host time per decode step, lookahead {lookahead}", facts))
    print(f"{'batch':>6} {'context':>8} {'waiting':>8} {'us/step':>9} {'p99 us':>8} {'blocks/step':>12}")
    for row in rows:
        print(
            f"{row.batch:>6} {row.context:>8} {row.queue:>8} {row.us_per_step:>9} {row.us_p99:>8} "
            f"{row.allocations_per_step:>12}"
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
    from gapless.bench.soak import STEADY_STEPS, Soak, as_json

    report = Soak.build(rows, lookahead).run(steps)
    print(
        f"{'steps':>8} {'us/step':>8} {'p10 us':>7} {'CPU us':>7} {'objects':>9} {'blocks':>9} {'tensors':>9} "
        f"{'pinned':>9} {'resident':>10} {'cyclic':>7}"
    )
    for number, window in enumerate(report.windows, 1):
        print(
            f"{number * report.window_steps:>8} {window.wall_us:>8} {window.wall_us_p10:>7} {window.cpu_us:>7} "
            f"{window.objects:>9} {window.blocks:>9} {window.tensor_bytes:>9} {window.pinned_bytes:>9} "
            f"{window.resident_bytes / 2**20:>6.1f} MiB {window.cyclic:>7}"
        )
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
    from gapless.bench.soak_requests import RequestSoak, as_json

    report = RequestSoak(rows, lookahead).run(steps)
    print(
        f"{'steps':>8} {'us/step':>8} {'CPU us':>7} {'objects':>9} {'blocks':>9} {'tensors':>9} {'pinned':>9} "
        f"{'resident':>10} {'cyclic':>7} {'left':>5}"
    )
    for number, window in enumerate(report.windows, 1):
        print(
            f"{number * report.window_steps:>8} {window.wall_us:>8} {window.cpu_us:>7} {window.objects:>9} "
            f"{window.blocks:>9} {window.tensor_bytes:>9} {window.pinned_bytes:>9} "
            f"{window.resident_bytes / 2**20:>6.1f} MiB {window.cyclic:>7} {window.left:>5}"
        )
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
    from gapless.bench.predict import as_json
    from gapless.bench.predict import predict as predict_one
    from gapless.trace.record import write_trace

    if trace is not None:
        check_target(trace, "trace")
    results = [
        predict_one(ahead, host=us * 1e-6, device=device_us * 1e-6, copy=copy_us * 1e-6, jitter=jitter, steps=steps)
        for us in host_us
        for ahead in lookahead or [0, 1, 2]
    ]
    print(f"{'host us':>9} {'device us':>10} {'lookahead':>10} {'us/step':>9} {'idle':>7}")
    for result in results:
        print(
            f"{result.host * 1e6:>9.1f} {result.device * 1e6:>10.1f} {result.lookahead:>10} "
            f"{result.step_seconds * 1e6:>9.1f} {result.idle_share:>7.1%}"
        )
    if trace is not None:
        write_trace(trace, [result.run for result in results])
    if json_output:
        print(json.dumps(as_json(results)))
