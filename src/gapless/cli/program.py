"""The commands of the program `gapless`, and what becomes of errors.

Exit status: 0 done; 1 failed, or some lines or prompts did; 2 wrong usage, or there is no such file or model;
130 interrupted; 143 terminated.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from gapless import __version__
from gapless.cli import bench, chat, env, generate, options, run_batch, serve, timeline
from gapless.cli.command import add_command
from gapless.cli.setup import say, warn
from gapless.cli.signals import sigterm_leaves
from gapless.errors import ConfigError, GaplessError, InputFileError, InvalidRequestError, ModelNotFoundError

_WRONG_USAGE = (ConfigError, InvalidRequestError, InputFileError, ModelNotFoundError)

app = typer.Typer(
    name="gapless",
    help="LLM inference whose accelerator never waits for its host.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def demo(
    model: options.Model = "demo",
    prompts: Annotated[int | None, typer.Option(min=1, max=45, help="Answer only this many of the prompts.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 96,
    trace: options.Trace = None,
) -> None:
    """Answer 45 prompts at once, synchronously and one step ahead, and compare."""
    from gapless.demo import run_demo

    say(f"loading {model} ...")
    with timeline.tracing(trace) as recorder:
        raise typer.Exit(run_demo(model, prompts, max_tokens, recorder))


add_command(app, generate.generate)
add_command(app, chat.chat)
add_command(app, serve.serve)
add_command(app, run_batch.run_batch)
add_command(app, demo)
app.add_typer(bench.app, name="bench")
add_command(app, timeline.timeline)
add_command(app, env.env)


def _show_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"gapless {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


def _show_traceback() -> None:
    if os.environ.get("GAPLESS_DEBUG") == "1":
        traceback.print_exc()


def run(argv: list[str] | None = None) -> NoReturn:
    """Run a command and exit. GAPLESS_DEBUG=1 shows the traceback of errors, too."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: a busy neighbour halves decode otherwise
    try:
        with sigterm_leaves():
            app(args=argv, prog_name="gapless")
    except GaplessError as error:
        _show_traceback()
        warn(f"error: {' '.join(str(error).split())}")
        sys.exit(2 if isinstance(error, _WRONG_USAGE) else 1)
    except OSError as error:
        _show_traceback()
        warn(f"error: {error}")
        sys.exit(1)
    sys.exit(0)
