"""How the tokens of one request are chosen: every parameter with its bounds, checked when it is made."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from gapless.errors import InvalidRequestError
from gapless.grammar.spec import GrammarSpec

MAX_N = 128
MAX_STOP_TOKEN_IDS = 64
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_SEED = 2**64
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_BAD_WORDS = 128
MAX_BAD_WORD_TOKENS = 16
MAX_PENALTY = 2.0
MIN_REPETITION = 0.01  # far less is 0 in the engine's 32 bits
MAX_REPETITION = 10.0
MAX_ID = 2**31 - 1
MAX_ARGUMENT = 1e30
_DECIMAL = re.compile(r"[0-9]{1,10}", re.ASCII)

AllowedTokens = Callable[[Sequence[int]], Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    n               continuations of the prompt, each with random numbers of its own; the prompt is computed once.
    temperature     0 is greedy; otherwise logits are divided by it.
    top_k           keep the k most likely tokens; 0 keeps all.
    top_p           keep the smallest set of most likely tokens whose probability reaches top_p (0 < top_p <= 1).
    min_p           drop tokens less likely than min_p times the likeliest one (0 <= min_p <= 1).
    seed            fixes the random numbers of this request: they depend on (seed, position) and nothing else.
                    None: derived from the engine's seed and the order of arrival.
    max_tokens      the most new tokens; None: up to the context limit.
    min_tokens      before so many new tokens nothing ends the request but max_tokens and the context limit, or the form
                    of its answer where nothing else may follow.
    stop            the request ends as soon as its text has one of these strings (1 to 16 of them, each of 1 to 256
                    characters; a single one may be given as it is). The text ends before it.
    include_stop_str_in_output  the text ends with it.
    stop_token_ids  these token ids end the request as end-of-sequence does, even under ignore_eos.
    ignore_eos      do not stop at the model's end-of-sequence tokens.

    repetition_penalty  0.01 to 10: scores of tokens that the prompt or the answer has are divided by it if
                        they are positive, else multiplied.
    presence_penalty    -2 to 2: taken from the scores of tokens that the answer has.
    frequency_penalty   -2 to 2: taken from them as often as the answer has the token.
    logit_bias          token id to -100 ... 100, added to its score; at most 1,024.
    allowed_token_ids   no other token is sampled.
    bad_words           1 to 128 texts, or lists of 1 to 16 token ids, that the answer shall not have. A text is banned
                        as it is tokenised at the beginning of a text and after a space.

    logprobs            0 to 20: the log probability of every sampled token, and of so many likeliest ones.
    prompt_logprobs     0 to 20: the same of the prompt's tokens, each after those before it.
    echo                the text begins with the prompt.

    At most one of these, and then the answer is of that form. It ends when nothing may follow, or at the model's choice
    where it may end; cut by max_tokens it is the beginning of such a text.
    json_schema         a JSON schema, as text or as an object.
    json_object         any JSON object.
    regex               a regular expression for the whole answer.
    choice              one of these texts.
    grammar             a context-free grammar in Lark's notation.
    allowed_tokens      a function from the token ids of prompt and answer to those that may come next. It runs on the
                        host in every step: see docs/features.md for what it costs.

    processor_args      arguments for the engine's logits processors, by name: see logits_processor.py.

    Order: penalties, bias, bans and masks, logits processors; then temperature, top_k, top_p, min_p. Tokens that tie
    with the last one kept are kept. Log probabilities are of the model's own scores, before all of these.
    Raises InvalidRequestError for a value out of range, or two that contradict each other.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 256
    min_tokens: int = 0
    stop: Sequence[str] = ()  # a string is one, too; a tuple of strings once it is checked
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float], hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: Sequence[str | Sequence[int]] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    json_schema: str | Mapping[str, Any] | bool | None = field(default=None, hash=False)
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    allowed_tokens: AllowedTokens | None = None
    processor_args: Mapping[str, float] = field(default_factory=dict[str, float], hash=False)
    grammar_spec: GrammarSpec | None = field(init=False, repr=False, compare=False)  # of the form, if it has a grammar

    def __post_init__(self) -> None:
        # Few are given, and requests are made by the thousand: what is the default needs no check.
        for name, default, low, high, open_low in _NUMBERS:
            if (value := getattr(self, name)) is not default:
                _check_number(name, value, low, high, open_low=open_low)
                self._set(name, float(value))  # numpy's numbers are welcome, but not their arithmetic
        for name, default, low, high in _INTEGERS:
            if (value := getattr(self, name)) is not default:
                _check_integer(name, value, low, high)
                self._set(name, int(value))
        for name in ("ignore_eos", "include_stop_str_in_output", "echo", "json_object"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        for name, check in _LISTS:
            value = getattr(self, name)
            if type(value) not in (tuple, dict) or value:
                self._set(name, check(value))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids, 1, MAX_ID))
        if self.allowed_tokens is not None and not callable(self.allowed_tokens):
            raise InvalidRequestError(f"allowed_tokens must be a function, not {self.allowed_tokens!r:.99}")
        self._check_form()

    def _check_form(self) -> None:
        """Of the answer: no more than one is asked for, and nothing that could leave it without a next token."""
        spec = GrammarSpec.of(
            json_schema=self.json_schema,
            json_object=self.json_object,
            regex=self.regex,
            choice=self.choice,
            grammar=self.grammar,
        )
        self._set("grammar_spec", spec)
        if self.choice is not None:
            self._set("choice", tuple(self.choice))
        if not self.has_form:
            return
        if self.allowed_tokens is not None and self.grammar_spec is not None:
            raise InvalidRequestError("allowed_tokens does not go together with a form of the answer: give one of them")
        for name in ("allowed_token_ids", "bad_words"):
            if getattr(self, name):
                raise InvalidRequestError(
                    f"{name} does not go together with a form of the answer, which could be left without a next token"
                )
        if self.allowed_tokens is None:
            if self.ignore_eos:
                raise InvalidRequestError("ignore_eos does not go together with a form of the answer, which has an end")
            if self.stop:
                raise InvalidRequestError("stop does not go together with a form of the answer, which it could cut")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def is_plain(self) -> bool:
        """Whether it asks nothing of the logits, but for how they are sampled from."""
        return (
            self.repetition_penalty == 1.0
            and self.presence_penalty == self.frequency_penalty == 0.0
            and self.min_tokens == 0
            and self.logprobs is None
            and self.allowed_token_ids is None
            and not self.logit_bias
            and not self.bad_words
            and not self.processor_args
            and not self.has_form
        )

    @property
    def has_form(self) -> bool:
        """Whether a mask must come with every token."""
        return self.allowed_tokens is not None or self.grammar_spec is not None


def _token_ids(name: str, value: object, fewest: int, most: int) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        raise InvalidRequestError(f"{name} must be a list of token ids, not {value!r:.99}")
    ids = tuple(cast("Sequence[object]", value))
    if not fewest <= len(ids) <= most:
        bound = f"at most {most}" if len(ids) > most else f"at least {fewest}"
        raise InvalidRequestError(f"{bound} {name}, not {len(ids)}")
    for token in ids:
        _check_integer(name, token, 0, MAX_ID)
    return tuple(int(cast("int", token)) for token in ids)


def _bias(value: object) -> dict[int, float]:
    """By token id. JSON has texts for keys, so decimal ones are welcome."""
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"logit_bias must map token ids to numbers, not {value!r:.99}")
    given = cast("Mapping[object, object]", value)
    if len(given) > MAX_BIASES:
        raise InvalidRequestError(f"at most {MAX_BIASES} tokens in logit_bias, not {len(given)}")
    found: dict[int, float] = {}
    for key, bias in given.items():
        token = int(key) if isinstance(key, str) and _DECIMAL.fullmatch(key) else key
        _check_integer("a token id of logit_bias", token, 0, MAX_ID)
        _check_number(f"the bias of token {token}", bias, -MAX_BIAS, MAX_BIAS)
        found[int(cast("int", token))] = float(cast("float", bias))
    return found


def _bad_words(value: object) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InvalidRequestError(f"bad_words must be a list of texts or of lists of token ids, not {value!r:.99}")
    words = tuple(cast("Sequence[object]", value))
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequestError(f"at most {MAX_BAD_WORDS} bad_words, not {len(words)}")
    found: list[str | tuple[int, ...]] = []
    for word in words:
        if isinstance(word, str):
            if not 0 < len(word) <= MAX_STOP_LENGTH:
                raise InvalidRequestError(f"a bad word has 1 to {MAX_STOP_LENGTH} characters, not {word!r:.300}")
            found.append(word)
        else:
            found.append(_token_ids("token ids of a bad word", word, 1, MAX_BAD_WORD_TOKENS))
    return tuple(found)


def _arguments(value: object) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"processor_args must map names to numbers, not {value!r:.99}")
    given = cast("Mapping[object, object]", value)
    for name, number in given.items():
        if not isinstance(name, str):
            raise InvalidRequestError(f"a name in processor_args must be a text, not {name!r:.99}")
        _check_number(f"processor_args[{name!r}]", number, -MAX_ARGUMENT, MAX_ARGUMENT)
    return {cast("str", name): float(cast("float", number)) for name, number in given.items()}


def _stop_strings(value: object) -> tuple[str, ...]:
    strings: object = (value,) if isinstance(value, str) else value
    if strings is None:
        return ()
    if not isinstance(strings, Sequence):
        raise InvalidRequestError(f"stop must be a string or a list of strings, not {value!r}")
    found = tuple(cast("Sequence[object]", strings))
    if len(found) > MAX_STOPS:
        raise InvalidRequestError(f"at most {MAX_STOPS} stop strings, not {len(found)}")
    for each in found:
        if not isinstance(each, str) or not 0 < len(each) <= MAX_STOP_LENGTH:
            raise InvalidRequestError(f"a stop string has 1 to {MAX_STOP_LENGTH} characters, not {each!r:.300}")
    return cast("tuple[str, ...]", found)


def _check_number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise InvalidRequestError(f"{name} must be a finite number, not {value!r}")
    number = float(value)
    if number < low or number > high or (open_low and number == low):
        bracket = "above" if open_low else "at least"
        raise InvalidRequestError(f"{name} must be {bracket} {low:g} and at most {high:g}, not {value!r}")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InvalidRequestError(f"{name} must be an integer, not {value!r}")
    if value < low or value > high:
        raise InvalidRequestError(f"{name} must be between {low} and {high}, not {value}")


_NUMBERS = (
    ("temperature", 1.0, 0.0, 100.0, False),
    ("top_p", 1.0, 0.0, 1.0, True),
    ("min_p", 0.0, 0.0, 1.0, False),
    ("repetition_penalty", 1.0, MIN_REPETITION, MAX_REPETITION, False),
    ("presence_penalty", 0.0, -MAX_PENALTY, MAX_PENALTY, False),
    ("frequency_penalty", 0.0, -MAX_PENALTY, MAX_PENALTY, False),
)
_INTEGERS = (
    ("n", 1, 1, MAX_N),
    ("top_k", 0, 0, MAX_ID),
    ("seed", None, 0, MAX_SEED - 1),
    ("max_tokens", None, 1, MAX_ID),
    ("min_tokens", 0, 0, MAX_ID),
    ("logprobs", None, 0, MAX_LOGPROBS),
    ("prompt_logprobs", None, 0, MAX_LOGPROBS),
)
_LISTS: tuple[tuple[str, Callable[[Any], object]], ...] = (
    ("stop", _stop_strings),
    ("stop_token_ids", lambda value: _token_ids("stop_token_ids", value, 0, MAX_STOP_TOKEN_IDS)),
    ("logit_bias", _bias),
    ("bad_words", _bad_words),
    ("processor_args", _arguments),
)
