"""`gapless bench`: measurements that anyone can repeat."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

app = typer.Typer(help="Measure this engine.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@app.command()
def host(
    batch: Annotated[list[int] | None, typer.Option(help="Running rows; repeatable.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens each row has; repeatable.")] = None,
    queue: Annotated[list[int] | None, typer.Option(help="Waiting requests; repeatable.")] = None,
    steps: Annotated[int, typer.Option(min=10, help="Timed steps.")] = 500,
    lookahead: Annotated[int, typer.Option(min=0, max=16, help="Steps ahead.")] = 1,
    json_output: Json = False,
) -> None:
    """Host time per decode step on a device that does nothing."""
    from gapless.bench.host import as_json, measure

    rows = [
        measure(b, c, q, steps=steps, lookahead=lookahead)
        for b in batch or [32, 256, 1024]
        for c in context or [64, 1024]
        for q in queue or [0, 10000]
    ]
    print(f"{'batch':>6} {'context':>8} {'waiting':>8} {'us/step':>9} {'p99 us':>8} {'blocks/step':>12}")
    for row in rows:
        print(
            f"{row.batch:>6} {row.context:>8} {row.queue:>8} {row.us_per_step:>9} {row.us_p99:>8} "
            f"{row.allocations_per_step:>12}"
        )
    if json_output:
        print(json.dumps(as_json(rows)))


@app.command()
def soak(
    steps: Annotated[int, typer.Option(min=100, help="Steps, in 20 windows after one to warm up.")] = 100_000,
    rows: Annotated[int, typer.Option(min=1, help="Rows; three times as many requests are there at once.")] = 32,
    lookahead: Annotated[int, typer.Option(min=0, max=16, help="Steps ahead.")] = 1,
    json_output: Json = False,
) -> None:
    """A long run of requests that come, end, are cancelled and preempted: what the host keeps, and its time per step.

    On a device that does nothing. Tensors are those of host and device, pinned is what was ever lent.
    """
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
    grown = ", ".join(
        f"{report.growth_per_100k(field):+.0f} {field.replace('_', ' ')}"
        for field in ("objects", "blocks", "tensor_bytes", "pinned_bytes")
    )
    print(
        f"growth per 100,000 steps: {grown}; time end/start: {report.ratio('wall_us'):.3f}, "
        f"p10 {report.ratio('wall_us_p10'):.3f}, CPU {report.ratio('cpu_us'):.3f}; function calls per decode step: "
        f"{report.calls_before / STEADY_STEPS:.2f} before, {report.calls_after / STEADY_STEPS:.2f} after"
    )
    if json_output:
        print(json.dumps(as_json(report)))


@app.command()
def decode(
    shape: Annotated[str, typer.Option(help="llama-8b, llama-1b, smollm2-135m, or a config.json.")] = "smollm2-135m",
    requests: Annotated[int, typer.Option(min=1, help="Requests, all running at once.")] = 32,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for each.")] = 64,
    lookahead: Annotated[
        list[int] | None, typer.Option(help="Steps ahead; repeat to compare. Default 0 and 1.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each, alternating.")] = 3,
    warm_up: Annotated[bool, typer.Option(help="One untimed run first.")] = True,
    trace: Annotated[bool | None, typer.Option(help="One more run under a kernel trace. Default: on a GPU.")] = None,
    graphs: Annotated[bool, typer.Option(help="Replay captured CUDA graphs.")] = True,
    block_size: Annotated[int, typer.Option(help="Tokens in a KV block.")] = 16,
    max_batch_tokens: Annotated[
        int | None, typer.Option(help="The most tokens in one step; 8192 on a GPU, 256 on a CPU.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    json_output: Json = False,
) -> None:
    """Offline decode of fixed lengths on random weights, greedy, start-up left out."""
    from gapless.bench.decode import DecodeBench, Workload, as_json, compare
    from gapless.config import EngineConfig

    lookaheads = lookahead or [0, 1]
    options: dict[str, Any] = {"dtype": dtype, "device": device, "graphs": graphs, "block_size": block_size}
    config = EngineConfig(
        lookahead=max(lookaheads),
        max_rows=requests,
        max_batch_tokens=max_batch_tokens,
        graph_buckets=(requests,),
        **options,
    )
    workload = Workload(requests=requests, prompt_len=prompt_len, new_tokens=new_tokens)
    bench = DecodeBench(shape, workload, config)
    try:
        results = compare(bench, lookaheads, repeat=repeat, warm_up=warm_up, traced=trace)
    finally:
        bench.close()
    summary = as_json(bench, results)
    environment = ", ".join(f"{name} {value}" for name, value in summary["environment"].items() if value)
    print(f"{shape}, {requests} x ({prompt_len} + {new_tokens}), {environment}", file=sys.stderr)
    print(
        f"{'lookahead':>9} {'seconds':>9} {'spread':>7} {'tokens/s':>10} {'ms/step':>8} {'busy (events)':>14} "
        f"{'busy (trace)':>13} {'idle between steps':>19}"
    )
    for result in results:
        busy = f"{result.trace.kernel_share:.2%}" if result.trace else "-"
        idle = f"{result.trace.between_steps:.3%}" if result.trace else "-"
        print(
            f"{result.lookahead:>9} {result.median_seconds:>9.3f} {result.spread_seconds:>7.3f} "
            f"{result.tokens_per_second:>10.0f} {result.median_seconds / new_tokens * 1e3:>8.3f} "
            f"{result.busy_share:>14.2%} {busy:>13} {idle:>19}"
        )
    if not summary["tokens_equal"]:
        print("the tokens of the runs differ", file=sys.stderr)
    if json_output:
        print(json.dumps(summary))


@app.command()
def predict(
    host_us: Annotated[list[float], typer.Option(min=0.0, help="What a step costs the host; repeatable.")],
    device_us: Annotated[float, typer.Option(min=1e-3, help="What a step costs the device.")],
    lookahead: Annotated[list[int] | None, typer.Option(help="Steps ahead; repeatable. Default 0, 1, 2.")] = None,
    copy_us: Annotated[float, typer.Option(min=0.0, help="What each of a step's two copies costs.")] = 0.0,
    jitter: Annotated[
        float, typer.Option(min=0.0, max=3.0, help="How the host's cost varies: standard deviation over mean.")
    ] = 0.0,
    steps: Annotated[int, typer.Option(min=10, help="Steps to simulate.")] = 500,
    json_output: Json = False,
) -> None:
    """Predict the device's idle share from what a step costs: the real loop in virtual time, no device needed."""
    from gapless.bench.predict import as_json
    from gapless.bench.predict import predict as predict_one

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
    if json_output:
        print(json.dumps(as_json(results)))
