"""--config FILE: options of a command in YAML, below the command line and the environment, above the defaults."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import cast, get_args

import typer

from gapless.errors import ConfigError

MAX_BYTES = 2**20
_TEXTS = (str, str | None, list[str], list[str] | None)  # options that are texts
_PATH = "gapless.config"  # in the meta of a context


def apply_config_file(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the running command. Raises ConfigError."""
    if path is not None:
        flags = {
            flag.lstrip("-").replace("-", "_"): option.name
            for option in context.command.params
            for flag in option.opts
            if flag.startswith("--") and flag not in ("--config", "--help")
        }
        values = read_config_file(path, set(flags))
        context.meta[_PATH] = path
        repeated = {option.name for option in context.command.params if getattr(option, "multiple", False)}
        declared = inspect.signature(cast("Callable[..., None]", context.command.callback), eval_str=True).parameters
        context.default_map = {}
        for name, value in values.items():
            given = [value] if flags[name] in repeated and not isinstance(value, list) else value
            if get_args(declared[flags[name]].annotation)[0] in _TEXTS:
                _check_text(cast("list[object]", given) if isinstance(given, list) else [given], path, name)
            context.default_map[flags[name]] = given
    return path


def place_in_file(context: typer.Context, flag: str) -> str:
    """How to call an option whose value came from the file."""
    return f"{context.meta[_PATH]}: {flag.lstrip('-')}"


def read_config_file(path: Path, known: set[str]) -> dict[str, object]:
    """The file's options by their names with underscores, which must be among `known`. Raises ConfigError."""
    import yaml

    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"the config file {path} is larger than {MAX_BYTES} bytes")
        content: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the config file {path} can not be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"the config file {path} is not valid YAML{where}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"the config file {path} must hold `name: value` lines")
    values: dict[str, object] = {}
    for key, value in cast("dict[object, object]", content).items():
        name = str(key).replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            names = [each.replace("_", "-") for each in close or sorted(known)]
            hint = f"did you mean {names[0]!r}?" if close else f"there are {', '.join(names)}"
            raise ConfigError(f"the config file {path} has the unknown option {str(key)!r}; {hint}")
        if value is None or value == []:
            raise ConfigError(f"{path}: {key} has no value: give one, or leave the line out")
        values[name] = value
    return values


def _check_text(values: list[object], path: Path, name: str) -> None:
    """What YAML takes for a number, a date or true is no text: 0123 would be 83."""
    for each in values:
        if not isinstance(each, str):
            where = f"{path}: {name.replace('_', '-')}"
            raise ConfigError(f"{where} must be a text, not {str(each)!r}: write it in quotes")
