"""`gapless bench decode`, `prefill` and `mixed`: the engine on random weights."""

from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gapless.cli import options
from gapless.cli.bench_options import Json, KernelTrace, Lookahead, Lookaheads, Repeat, Shape, WarmUp
from gapless.cli.setup import say, warn
from gapless.cli.table import UNKNOWN, print_table
from gapless.cli.timeline import tracing

if TYPE_CHECKING:
    from gapless.bench.decode import Comparison
    from gapless.bench.mixed import MixedReport
    from gapless.bench.prefill import PrefillReport
    from gapless.bench.trace import Part


def decode(
    shape: Shape = "smollm2-135m",
    requests: Annotated[int, typer.Option(min=1, help="Requests, all running at once.")] = 32,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for each.")] = 64,
    lookahead: Lookaheads = None,
    compare: Annotated[
        int | None, typer.Option(min=0, max=16, help="One more lookahead, to compare the others with.")
    ] = None,
    repeat: Repeat = 3,
    warm_up: WarmUp = True,
    kernel_trace: KernelTrace = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0.0, help="Of the machine: gives the cost of a million generated tokens.")
    ] = None,
    graphs: options.Graphs = True,
    block_size: options.BlockSize = 16,
    max_batch_tokens: options.MaxBatchTokens = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trace: options.Trace = None,
    json_output: Json = False,
) -> None:
    """Offline decode of fixed lengths, greedy, start-up left out.

    The floor is the time to read the weights and the KV cache once for each step, at the read bandwidth measured in
    the same run.
    """
    from gapless.bench import decode as bench
    from gapless.config import EngineConfig

    wanted = lookahead or ([0, 1] if compare is None else [1])
    lookaheads = list(dict.fromkeys(wanted if compare is None else [*wanted, compare]))
    chosen: dict[str, Any] = {"dtype": dtype, "device": device}
    config = EngineConfig(
        lookahead=max(lookaheads),
        max_rows=requests,
        max_batch_tokens=max_batch_tokens,
        graphs=graphs,
        graph_buckets=(requests,),
        block_size=block_size,
        **chosen,
    )
    workload = bench.Workload(requests=requests, prompt_len=prompt_len, new_tokens=new_tokens)
    say(f"loading {shape} ...")
    with tracing(trace) as recorder, closing(bench.DecodeBench(shape, workload, config, recorder)) as decoding:
        print(f"decode: {shape}, {requests} x ({prompt_len} + {new_tokens})", flush=True)
        report = bench.compare(
            decoding,
            lookaheads,
            repeat=repeat,
            warm_up=warm_up,
            traced=kernel_trace,
            price_per_hour=price_per_hour,
            tell=say,
        )
    _show_decode(report)
    if json_output:
        print(json.dumps(report.as_json()))


def _show_decode(report: Comparison) -> None:
    from gapless.bench.environment import quoted_with

    work, floor = report.workload, report.floor
    print(quoted_with(report.environment))
    print(
        f"floor: {floor.seconds:.3f} s, {floor.weight_bytes / 1e9:.3f} GB of weights and {floor.kv_bytes / 1e9:.3f} GB "
        f"of KV a step at {floor.read_rate / 1e9:.1f} GB/s"
    )
    print_table(
        [
            *("lookahead", "seconds", "spread", "tokens/s", "ms/step", "x\nfloor", "busy\n(events)"),
            *("busy\n(trace)", "idle\nbetween", "cost\n/1M"),
        ],
        [
            [
                str(result.lookahead),
                f"{result.median_seconds:.3f}",
                f"{result.spread_seconds:.3f}",
                f"{result.tokens_per_second:.0f}",
                f"{result.median_seconds / work.new_tokens * 1e3:.3f}",
                f"{result.floor_ratio:.2f}",
                f"{result.busy_share:.2%}",
                f"{result.trace.work_share:.2%}" if result.trace else UNKNOWN,
                f"{result.trace.between_steps:.3%}" if result.trace else UNKNOWN,
                UNKNOWN if result.cost_per_million_tokens is None else f"{result.cost_per_million_tokens:.4f}",
            ]
            for result in report.results
        ],
    )
    for result in report.results:
        if result.trace:
            print(f"a step at lookahead {result.lookahead}, {result.trace.kernels_per_step:.0f} kernels:")
            _show_parts(result.trace.parts)
    if not report.tokens_equal:
        warn("the tokens of the runs differ")


def _show_parts(parts: tuple[Part, ...]) -> None:
    for part in parts:
        print(f"{part.us:>12.1f} us {part.launches:>8.1f} x  {part.name}")
    print(f"{sum(part.us for part in parts):>12.1f} us in all")


def prefill(
    shape: Shape = "smollm2-135m",
    prompt_len: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens of each prompt; repeatable. Default 512, 2048, 8192, as the context allows."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Of all prompts of a run, about. Default: eight full steps.")
    ] = None,
    lookahead: Lookahead = 1,
    repeat: Repeat = 3,
    kernel_trace: KernelTrace = None,
    block_size: options.BlockSize = 16,
    max_batch_tokens: options.MaxBatchTokens = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trace: options.Trace = None,
    json_output: Json = False,
) -> None:
    """Prompts of one length with one new token each.

    The linear layers' operations over the whole time are compared with what matrix products of the same shapes, with
    as many rows as a full step has tokens, reach in the same run.
    """
    from gapless.bench.prefill import PrefillBench
    from gapless.config import EngineConfig

    chosen: dict[str, Any] = {"dtype": dtype, "device": device}
    config = EngineConfig(lookahead=lookahead, block_size=block_size, max_batch_tokens=max_batch_tokens, **chosen)
    say(f"loading {shape} ...")
    with (
        tracing(trace) as recorder,
        closing(PrefillBench(shape, config, prompt_lens=prompt_len or (), tokens=tokens, trace=recorder)) as bench,
    ):
        print(f"prefill: {shape}, lookahead {lookahead}", flush=True)
        report = bench.measure(repeat=repeat, traced=kernel_trace, tell=say)
    _show_prefill(report)
    if json_output:
        print(json.dumps(report.as_json()))


def _show_prefill(report: PrefillReport) -> None:
    from gapless.bench.environment import quoted_with

    print(quoted_with(report.environment))
    print(f"matrix products of {report.step_tokens} rows: {report.matrix_rate / 1e12:.3f} TFLOP/s")
    print_table(
        [
            *("prompt", "requests", "seconds", "spread", "tokens/s"),
            *("linear\nTFLOP/s", "of\nproducts", "attention"),
        ],
        [
            [
                str(result.prompt_len),
                str(result.requests),
                f"{result.median_seconds:.3f}",
                f"{result.spread_seconds:.3f}",
                f"{result.tokens_per_second:.0f}",
                f"{result.linear_flops / 1e12:.3f}",
                f"{result.linear_share:.1%}",
                UNKNOWN if result.attention_share is None else f"{result.attention_share:.1%}",
            ]
            for result in report.results
        ],
    )
    for result in report.results:
        if result.parts:
            print(f"the kernels of a run with prompts of {result.prompt_len}:")
            _show_parts(result.parts)


def mixed(
    shape: Shape = "smollm2-135m",
    rate: Annotated[float, typer.Option(help="Requests a second on average; inf sends all at once.")] = 2.0,
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 32,
    max_prompt_len: Annotated[
        int, typer.Option(min=1, help="Longest prompt; lengths are even on a logarithmic scale from a 32nd of it.")
    ] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer; drawn alike.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Fixes arrivals, lengths and tokens.")] = 0,
    lookahead: Lookaheads = None,
    repeat: Repeat = 3,
    warm_up: WarmUp = True,
    max_rows: options.MaxRows = 256,
    kv_cache_memory: options.KVCacheMemory = None,
    block_size: options.BlockSize = 16,
    max_batch_tokens: options.MaxBatchTokens = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trace: options.Trace = None,
    json_output: Json = False,
) -> None:
    """Requests that arrive at random times, with mixed lengths: throughput and latency.

    Arrivals are Poisson; the time to the first token counts from when a request was due. Latencies are what the
    reader of the engine's outputs sees; detokenisation is left out. The warm-up sends all requests at once.
    """
    from gapless.bench.mixed import MixedBench, MixedLoad
    from gapless.config import EngineConfig

    load = MixedLoad(
        rate=rate, requests=requests, max_prompt_len=max_prompt_len, max_new_tokens=max_new_tokens, seed=seed
    )
    lookaheads = list(dict.fromkeys(lookahead or [0, 1]))
    chosen: dict[str, Any] = {"dtype": dtype, "device": device}
    config = EngineConfig(
        lookahead=max(lookaheads),
        max_rows=max_rows,
        max_batch_tokens=max_batch_tokens,
        kv_cache_bytes=kv_cache_memory,
        block_size=block_size,
        **chosen,
    )
    say(f"loading {shape} ...")
    with tracing(trace) as recorder, closing(MixedBench(shape, load, config, recorder)) as bench:
        print(
            f"mixed: {shape}, {requests} requests at {rate:g}/s, prompts to {max_prompt_len} and answers to "
            f"{max_new_tokens} tokens, seed {seed}, {max_rows} rows",
            flush=True,
        )
        report = bench.measure(lookaheads, repeat=repeat, warm_up=warm_up, tell=say)
    _show_mixed(report)
    if json_output:
        print(json.dumps(report.as_json()))


def _show_mixed(report: MixedReport) -> None:
    from gapless.bench.environment import quoted_with

    print(quoted_with(report.environment))
    print("medians of the runs")
    medians = [(result, result.median) for result in report.results]
    print_table(
        [
            *("lookahead", "seconds", "spread", "tokens/s"),
            *("waiting", "most", "running", "rows/step", "busy"),
        ],
        [
            [
                str(result.lookahead),
                f"{median.seconds:.3f}",
                f"{result.spread.seconds:.3f}",
                f"{median.tokens_per_second:.0f}",
                f"{median.waiting_mean:.2f}",
                f"{median.waiting_max:.0f}",
                f"{median.running_mean:.2f}",
                f"{median.batch_mean:.2f}",
                f"{median.busy_share:.1%}",
            ]
            for result, median in medians
        ],
    )
    print("TTFT (time to first token) and ITL (inter-token latency) in ms")
    print_table(
        ["lookahead", "TTFT p50", "p99", "ITL p50", "p99"],
        [
            [
                str(result.lookahead),
                f"{median.ttft_p50:.2f}",
                f"{median.ttft_p99:.2f}",
                f"{median.inter_token_p50:.2f}",
                f"{median.inter_token_p99:.2f}",
            ]
            for result, median in medians
        ],
    )
