"""`gapless bench`: measurements that anyone can repeat."""

from __future__ import annotations

import typer

from gapless.cli import bench_host, bench_speed

app = typer.Typer(help="Measure this engine.", no_args_is_help=True)
app.command()(bench_speed.decode)
app.command()(bench_speed.prefill)
app.command()(bench_speed.mixed)
app.command()(bench_host.host)
app.command()(bench_host.soak)
app.command()(bench_host.predict)
