"""`gapless bench features`: what the features of a request cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gapless.cli import options
from gapless.cli.bench_options import Json, Lookaheads, Repeat, Shape
from gapless.cli.setup import say
from gapless.cli.table import print_table


def features(
    shape: Shape = "smollm2-135m",
    requests: Annotated[int, typer.Option(min=2, help="Requests, all running at once.")] = 32,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for each.")] = 64,
    feature: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.")] = None,
    lookahead: Lookaheads = None,
    repeat: Repeat = 3,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder with a tokenizer.json, for stop strings and JSON: a shape has none."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="Of all requests; 0 is greedy.")] = 0.0,
    deterministic: options.Deterministic = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
    json_output: Json = False,
) -> None:
    """Offline decode with none, half and all of the requests using a feature, start-up left out."""
    from gapless.bench import features as bench
    from gapless.bench.decode import Workload
    from gapless.bench.environment import quoted_with
    from gapless.config import EngineConfig

    lookaheads = list(dict.fromkeys(lookahead or [0, 1]))
    chosen: dict[str, Any] = {"dtype": dtype, "device": device}
    config = EngineConfig(
        lookahead=max(lookaheads),
        max_rows=requests,
        graph_buckets=(requests,),
        deterministic=deterministic,
        **chosen,
    )
    workload = Workload(requests=requests, prompt_len=prompt_len, new_tokens=new_tokens)
    say(f"loading {shape} ...")
    report = bench.measure(
        shape,
        workload,
        config,
        lookaheads,
        tokenizer=tokenizer,
        only=feature or [],
        repeat=repeat,
        temperature=temperature,
        tell=say,
    )
    print(f"features: {shape}, {requests} x ({prompt_len} + {new_tokens})")
    print(quoted_with(report.environment))
    print_table(
        ["feature", "rows", "lookahead", "tokens/s", "of plain"],
        [
            [row.feature, f"{row.share:.0%}", str(row.lookahead), f"{row.tokens_per_second:.0f}", f"{row.ratio:.1%}"]
            for row in report.rows
        ],
    )
    if json_output:
        print(json.dumps(report.as_json()))
