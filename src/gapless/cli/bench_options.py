"""Options that the measurements share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Shape = Annotated[str, typer.Option(help="llama-8b, llama-1b, smollm2-135m, or a config.json.")]
Repeat = Annotated[int, typer.Option(min=1, help="Timed runs of each, alternating.")]
WarmUp = Annotated[bool, typer.Option(help="One untimed run first.")]
Lookahead = Annotated[int, typer.Option(min=0, max=16, help="Steps ahead.")]
Lookaheads = Annotated[
    list[int] | None, typer.Option("--lookahead", min=0, max=16, help="Steps ahead; repeatable. Default 0 and 1.")
]
KernelTrace = Annotated[bool | None, typer.Option(help="One more run of each under a kernel trace. Default: on a GPU.")]
