"""The sampling options of commands, in one place: as a command's arguments, and as SamplingParams."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from gapless.cli import options
from gapless.errors import ConfigError, InputFileError

if TYPE_CHECKING:
    from gapless.params import SamplingParams

MAX_FILE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Those that every answer can have. The names are those of options, which repeat where SamplingParams has lists."""

    temperature: options.Temperature = 1.0
    top_k: options.TopK = 0
    top_p: options.TopP = 1.0
    min_p: options.MinP = 0.0
    max_tokens: options.MaxTokens = 256
    stop: options.Stop = None
    repetition_penalty: options.RepetitionPenalty = 1.0
    presence_penalty: options.PresencePenalty = 0.0
    frequency_penalty: options.FrequencyPenalty = 0.0
    logit_bias: options.LogitBias = None
    bad_word: options.BadWord = None
    json_schema: options.JsonSchema = None
    json_object: options.JsonObject = False
    regex: options.Regex = None
    choice: options.Choice = None
    grammar: options.Grammar = None

    def params(self) -> SamplingParams:
        """Raises InvalidRequestError, ConfigError, InputFileError."""
        from gapless.params import SamplingParams

        return SamplingParams(**self._arguments())

    def _arguments(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["bad_words"] = values.pop("bad_word") or ()
        values["stop"] = tuple(values["stop"] or ())
        values["logit_bias"] = parse_biases(values["logit_bias"] or ())
        values["choice"] = values["choice"] or None
        for name in ("json_schema", "grammar"):
            values[name] = read_text(f"--{name.replace('_', '-')}", values[name])
        return values


@dataclass(frozen=True, kw_only=True)
class ChatOptions(SamplingOptions):
    """Of a conversation: livelier than the field's defaults are."""

    temperature: options.Temperature = 0.7
    top_p: options.TopP = 0.95
    max_tokens: options.MaxTokens = 512


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SamplingOptions):
    """Of prompts in a list."""

    n: options.N = 1
    min_tokens: options.MinTokens = 0
    stop_token_id: options.StopTokenIds = None
    ignore_eos: options.IgnoreEos = False
    logprobs: options.Logprobs = None
    prompt_logprobs: options.PromptLogprobs = None
    echo: options.Echo = False

    def _arguments(self) -> dict[str, Any]:
        values = super()._arguments()
        values["stop_token_ids"] = tuple(values.pop("stop_token_id") or ())
        return values


def with_options(kind: type[SamplingOptions]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a command with an argument `sampling` of this kind: it gets the kind's options in that place."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(kind, include_extras=True)
        names = [field.name for field in fields(kind)]
        chosen = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in fields(kind)
        ]
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
            parameters += chosen if name == "sampling" else [parameter]

        @functools.wraps(command)
        def gathered(**values: Any) -> None:
            sampling = kind(**{name: values.pop(name) for name in names})
            command(sampling=sampling, **values)

        gathered.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
        gathered.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return gathered

    return decorate


def parse_biases(items: Sequence[str]) -> dict[int, float]:
    """ID=BIAS each. Raises ConfigError."""
    found: dict[int, float] = {}
    for item in items:
        token, _, bias = item.partition("=")
        try:
            found[int(token)] = float(bias)
        except ValueError:
            raise ConfigError(f"--logit-bias takes ID=BIAS, such as 42=-1.5, not {item!r}") from None
    return found


def read_text(option: str, value: str | None) -> str | None:
    """A text as it is, or what the file behind an @ holds. Raises InputFileError, ConfigError."""
    if value is None or not value.startswith("@"):
        return value
    path = Path(value[1:]).expanduser()
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{option}: {path} is larger than {MAX_FILE_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputFileError(f"{option}: {path} can not be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option}: {path} is not UTF-8") from error
