"""`gapless bench`: measurements that anyone can repeat."""

from __future__ import annotations

import typer

from gapless.cli import bench_features, bench_host, bench_speed
from gapless.cli.command import add_command

app = typer.Typer(help="Measure this engine.", no_args_is_help=True)
add_command(app, bench_speed.decode)
add_command(app, bench_speed.prefill)
add_command(app, bench_speed.mixed)
add_command(app, bench_features.features)
add_command(app, bench_host.host)
add_command(app, bench_host.soak)
add_command(app, bench_host.predict)
