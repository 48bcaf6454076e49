"""What all commands have in common: help in whole paragraphs, Ctrl-C, and whose fault a wrong value is."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

from gapless.cli.config_file import place_in_file
from gapless.cli.environment import check_environment
from gapless.cli.signals import leave_interrupted
from gapless.errors import ConfigError

_LINE_END = re.compile(r"(?<!\n)\n(?!\n|gapless |\{)")


def add_command(app: typer.Typer, function: Callable[..., None]) -> None:
    """A command with the name and the docstring of a function."""
    app.command(cls=_Command, help=join_lines(function.__doc__ or ""))(function)


def join_lines(text: str) -> str:
    """A docstring with each paragraph on one line, to be wrapped as wide as the terminal is; examples keep theirs."""
    return _LINE_END.sub(" ", re.sub(r"\n +", "\n", text.strip()))


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises ConfigError for a wrong value that does not come from the command line."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            found = _origin(ctx, error.param)
            if found is None:
                raise
            origin, value = found
            said = error.message if repr(value) in error.message else f"{value!r}: {error.message}"
            raise ConfigError(f"{origin}: {said}") from error

    def invoke(self, ctx: Any) -> Any:
        """typer alone ends on Ctrl-C without a word. Raises ConfigError for a variable that no option reads."""
        check_environment(ctx.find_root().command, os.environ)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            leave_interrupted()


def _origin(ctx: Any, parameter: Any) -> tuple[str, object] | None:
    """Where an option's value comes from, and what it is; None for the command line."""
    if parameter is None or (source := ctx.get_parameter_source(parameter.name)) is None:
        return None
    if source.name == "ENVIRONMENT":
        return parameter.envvar, os.environ[parameter.envvar]
    if source.name == "DEFAULT_MAP":
        return place_in_file(ctx, parameter.opts[0]), ctx.default_map[parameter.name]
    return None
