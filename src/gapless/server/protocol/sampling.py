"""What chat and completions have in common: how tokens are chosen, and of what form the answer is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from gapless.errors import InvalidRequestError
from gapless.grammar.spec import MAX_CHOICES
from gapless.params import (
    MAX_BAD_WORDS,
    MAX_BIAS,
    MAX_BIASES,
    MAX_ID,
    MAX_LOGPROBS,
    MAX_N,
    MAX_PENALTY,
    MAX_REPETITION,
    MAX_SEED,
    MAX_STOP_LENGTH,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    MIN_REPETITION,
    SamplingParams,
)
from gapless.prompts import MAX_SALT_LENGTH
from gapless.request import MAX_PRIORITY

MAX_MIN_TOKENS = 2**30  # with a prompt's length it stays within 32 bits
TokenId = Annotated[int, Field(ge=0, le=MAX_ID)]
Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Schema = dict[str, Any]
Choices = Annotated[
    list[str],
    Field(fail_fast=True, max_length=MAX_CHOICES),
    WithJsonSchema(
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": MAX_CHOICES}
    ),
]
_Biases = Annotated[
    dict[str, Any],
    Field(max_length=MAX_BIASES),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
            "maxProperties": MAX_BIASES,
        }
    ),
]


class Body(BaseModel):
    """A request. Fields that nobody knows are let pass; a null is as good as nothing; numbers are finite."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Body):
    """include_usage: a last chunk with the usage. continuous_usage_stats: the usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(Body):
    """The answer is JSON that the schema describes, `strict` or not."""

    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """Of what form the answer is."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Body):
    """The same in another spelling: one of them."""

    json_: Schema | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None


class SamplingFields(Body):
    """How tokens are chosen: see SamplingParams."""

    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    best_of: int | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_ID)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=MAX_SEED)] | None = None
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_MIN_TOKENS)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION, le=MAX_REPETITION)] | None = None
    logit_bias: _Biases | None = None
    bad_words: Annotated[list[Any], Field(max_length=MAX_BAD_WORDS)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(fail_fast=True, min_length=1)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    json_schema: Schema | str | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    cache_salt: Annotated[str, Field(max_length=MAX_SALT_LENGTH)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    user: str | None = None

    def sampling_arguments(self, form: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """For SamplingParams, without limits of length and without log probabilities. Raises InvalidRequestError.

        form: the answer's, in place of the one that is asked for.
        """
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequestError("best_of is not supported: it may only be n")
        given = {name: value for name in _SAME if (value := getattr(self, name)) is not None}
        if self.top_k == -1:
            given["top_k"] = 0
        if self.seed is not None:
            given["seed"] = self.seed % MAX_SEED
        return {**given, **(self.form() if form is None else form)}

    def form(self) -> dict[str, Any]:
        """The one form that is asked for, however it is spelled, for SamplingParams. Raises InvalidRequestError if they
        are two."""
        found = [(name, value) for name, value in self._forms() if value is not None]
        if len(found) > 1:
            raise InvalidRequestError(f"an answer has at most one form, not {' and '.join(name for name, _ in found)}")
        return dict(found)

    def _forms(self) -> list[tuple[str, Any]]:
        """All of them."""
        forms = [(name, getattr(self, name)) for name in ("json_schema", "regex", "choice", "grammar")]
        return forms + _forms_of(self.response_format) + _forms_of_structured(self.structured_outputs)


def _forms_of(given: ResponseFormat | None) -> list[tuple[str, Any]]:
    if given is None or given.type == "text":
        return []
    if given.type == "json_object":
        return [("json_object", True)]
    if given.json_schema is None:
        raise InvalidRequestError("response_format: json_schema is missing")
    schema = given.json_schema.schema_
    return [("json_object", True)] if schema is None else [("json_schema", schema)]


def _forms_of_structured(given: StructuredOutputs | None) -> list[tuple[str, Any]]:
    if given is None:
        return []
    return [
        ("json_schema", given.json_),
        ("json_object", given.json_object or None),
        ("regex", given.regex),
        ("choice", given.choice),
        ("grammar", given.grammar),
    ]


def make_params(arguments: Mapping[str, Any]) -> SamplingParams:
    """Raises InvalidRequestError, as SamplingParams does."""
    return SamplingParams(**arguments)


_SAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "bad_words",
    "allowed_token_ids",
    "prompt_logprobs",
)
