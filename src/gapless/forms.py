"""The forms that answers may be asked to have: a grammar's, or what a function of the caller's allows."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gapless.errors import EngineDeadError, InvalidRequestError
from gapless.params import AllowedTokens, SamplingParams
from gapless.request import Form, TokenMasks, prompt_array
from gapless.sampling.records import bit_mask
from gapless.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gapless.grammar.compiler import GrammarCompiler
    from gapless.grammar.matcher import Grammar

_ERROR_LENGTH = 300


class Forms:
    """Makes the forms of one model's answers. The compiler of grammars is there from the first one on.

    Callable from any thread. Grammars are compiled in processes first, which close() ends.

    checked  grammars that come have been compiled elsewhere, within the limits: they need no process
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._compiler: GrammarCompiler | None = None
        self._closed = False
        self._lock = threading.Lock()
        self.checked = False

    def form_of(
        self, params: SamplingParams, prompt: Sequence[int] | NDArray[Any], stop_ids: Collection[int]
    ) -> Form | None:
        """The form that params ask for, None if they ask for none. `stop_ids` end the request.

        Raises InvalidRequestError: a grammar can not be compiled or takes too long, the model has no tokenizer, or
        nothing could end the answer.
        """
        if params.allowed_tokens is not None:
            known = prompt_array(prompt, self._vocab_size).tolist()
            return AllowedForm(params.allowed_tokens, known, self._vocab_size, frozenset(stop_ids), params.min_tokens)
        if params.grammar_spec is None:
            return None
        form = GrammarForm(self._get_compiler().compile(params.grammar_spec), sorted(stop_ids), params.min_tokens)
        form.start()  # what it refuses it refuses here, and not on the engine's thread
        return form

    def read_vocabulary(self) -> None:
        """What grammars need, some tenths of a second, now and not at the first of them."""
        if self._tokenizer is not None:
            with suppress(InvalidRequestError):  # a tokenizer that no grammar can be had for: each request is told
                self._get_compiler().read_vocabulary()

    def close(self) -> None:
        """Compile no more grammars: from now on they raise EngineDeadError. May be called again."""
        with self._lock:
            self._closed = True
            if self._compiler is not None:
                self._compiler.close()

    def _get_compiler(self) -> GrammarCompiler:
        from gapless.grammar.compiler import GrammarCompiler

        if self._tokenizer is None:
            raise InvalidRequestError("this model was loaded without a tokenizer: there is no text to have a form")
        with self._lock:
            if self._closed:
                raise EngineDeadError("the engine was closed")
            if self._compiler is None:
                self._compiler = GrammarCompiler(
                    self._tokenizer, self._vocab_size, self._eos_token_ids, checked=self.checked
                )
            return self._compiler


class GrammarForm:
    """A grammar's texts."""

    def __init__(self, grammar: Grammar, stop_ids: Sequence[int], min_tokens: int) -> None:
        self._grammar = grammar
        self._stop_ids = stop_ids
        self._min_tokens = min_tokens

    def start(self) -> TokenMasks:
        """See request.py `Form`."""
        return self._grammar.matcher(min_tokens=self._min_tokens, stop_ids=self._stop_ids)


class AllowedForm:
    """What params.allowed_tokens says, asked before every token.

    The function gets a list of all token ids so far, prompt and answer, which is its own to keep, and returns the ids
    that may come next, in any order. It runs on a thread beside the engine's. If it
    raises, or returns no id or one that is not in the vocabulary, that sequence ends with the error. Before there are
    min_tokens tokens, stop ids among others are left out.
    """

    def __init__(
        self, function: AllowedTokens, prompt: list[int], vocab_size: int, stop_ids: frozenset[int], min_tokens: int
    ) -> None:
        self.function = function
        self.prompt = prompt
        self.vocab_size = vocab_size
        self.stop_ids = stop_ids
        self.min_tokens = min_tokens

    def start(self) -> TokenMasks:
        """See request.py `Form`."""
        return AllowedMasks(self)


class AllowedMasks:
    """One sequence of an AllowedForm."""

    def __init__(self, form: AllowedForm) -> None:
        self._form = form
        self._tokens = form.prompt.copy()
        self.error: str | None = None

    def accept(self, token_id: int) -> None:
        """The sequence has this token."""
        self._tokens.append(token_id)

    def fill(self, mask_W: NDArray[np.int32]) -> None:
        """Ask the function. All bits are 0 if there is an error."""
        try:
            ids = self._ids(self._form.function(self._tokens.copy()))
        except BaseException as error:  # noqa: BLE001 - what callers write may raise anything; it is this request's
            reason = str(error) if isinstance(error, _AnswerError) else f"raised {type(error).__name__}: {error}"
            self.error = f"allowed_tokens {' '.join(reason.split())}"[:_ERROR_LENGTH]
            mask_W[:] = 0
        else:
            mask_W[:] = bit_mask(ids, self._form.vocab_size)

    def _ids(self, answer: object) -> NDArray[np.int32]:
        found: Any = answer if isinstance(answer, np.ndarray) else list(answer)  # pyright: ignore[reportArgumentType, reportCallIssue, reportUnknownVariableType]
        if not len(found):
            raise _AnswerError("allows no token")
        ids = np.asarray(found)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise _AnswerError(f"must return token ids, not {answer!r:.99}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._form.vocab_size:
            raise _AnswerError(
                f"returned token id {low if low < 0 else high}, which is outside the vocabulary "
                f"(0 to {self._form.vocab_size - 1})"
            )
        if len(self._tokens) - len(self._form.prompt) < self._form.min_tokens:
            going_on = ids[~np.isin(ids, list(self._form.stop_ids))]
            ids = going_on if going_on.size else ids
        return ids.astype(np.int32)


class _AnswerError(Exception):
    """What the function returned is wrong."""
