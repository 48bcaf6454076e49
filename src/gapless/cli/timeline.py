"""`gapless timeline`: a trace as a picture, and `--trace` of the commands that make one."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gapless.cli.setup import say
from gapless.cli.signals import held_back
from gapless.cli.targets import check_target, naming
from gapless.errors import ConfigError

if TYPE_CHECKING:
    from gapless.trace.record import Trace


def timeline(
    traces: Annotated[
        list[Path],
        typer.Argument(metavar="TRACE", help="A file that --trace wrote. Several are drawn one below the other."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="NAME.html for a page, NAME.svg for the picture alone. Default: the first TRACE's name with .html.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=200, help="Decode steps to draw, of typical length.")] = 4,
) -> None:
    """Draw lookahead 0 over lookahead 1: what host and device did, on one time scale, and how long the device idled.

    gapless bench decode --lookahead 0 --lookahead 1 --trace trace.json
    gapless timeline trace.json
    """
    from gapless.trace.page import page, picture
    from gapless.trace.read import read_files

    path = output or traces[0].with_suffix(".html")
    if any(path.resolve() == trace.resolve() for trace in traces):
        raise ConfigError(f"the picture would overwrite the trace {path}")
    if path.suffix not in (".html", ".svg"):
        raise ConfigError(f"the picture {path} must end in .html, for a page, or in .svg")
    check_target(path, "picture")
    runs = read_files(traces)
    text = picture(runs, steps) if path.suffix == ".svg" else page(runs, steps)
    with naming(path):
        path.write_text(text, encoding="utf-8")
    print(path)


@contextmanager
def tracing(path: Path | None, *others: str | None) -> Generator[Trace | None]:
    """A trace for load_engine, written when the block ends, in whatever way; None without a path.

    Raises ConfigError at once if the file may not be written, or is one of the command's `others`.
    """
    if path is None:
        yield None
        return
    check_target(path, "trace")
    if any(other is not None and Path(other).resolve() == path.resolve() for other in others):
        raise ConfigError(f"the trace would overwrite {path}, which this command reads or writes")
    from gapless.trace.record import Trace

    trace = Trace()
    try:
        yield trace
    finally:
        with held_back(), naming(path):
            trace.write(path)
        say(f"the trace is in {path}: gapless timeline {path} draws it")
