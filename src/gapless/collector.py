"""From the engine's records, one per step, to what each request has so far. For one thread at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

from gapless.engine.core import EngineFailure
from gapless.errors import EngineDeadError, InternalError
from gapless.outcome import Committed, Finished
from gapless.outputs import CompletionOutput, FinishWord, RequestOutput, Usage
from gapless.request import FinishReason, Request
from gapless.text.detokenize import Detokenizer
from gapless.text.stops import StopFilter, StopStrings
from gapless.text.tokenizer import Tokenizer

_WORDS: dict[FinishReason, FinishWord] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "cancelled",
}


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Prepared:
    """A request that was checked and has its id, but is not queued. `prompt` is its text, if it had one."""

    request: Request
    prompt: str | None

    @property
    def request_id(self) -> int:
        return self.request.request_id


@dataclass(slots=True, eq=False)
class Generation:
    """The continuation of one request as far as it is known. Text is made when somebody asks for it.

    Asked once at the end it is decoded at once; asked along the way it comes from an incremental detokenizer. Both
    give the same text.
    """

    prepared: Prepared
    tokenizer: Tokenizer | None
    token_ids: list[int] = field(default_factory=list[int])
    finish_reason: FinishWord | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0
    text: str = ""
    read: int = 0  # token ids whose text is in `text`
    _detokenizer: Detokenizer | None = None
    _complete: bool = False  # the end of the text is in `text`
    _prompt_token_ids: list[int] = field(default_factory=list[int])

    @property
    def request_id(self) -> int:
        return self.prepared.request.request_id

    def advance(self) -> tuple[str, list[int]]:
        """The text and the token ids since the last call. After the end of the request: all that was left."""
        new = self.token_ids[self.read :]
        self.read = len(self.token_ids)
        text = self._text_of(new)
        self.text += text
        return text, new

    def output(self, *, delta: bool = False) -> RequestOutput:
        """All that is known so far; with `delta`, text and token ids are only those since the last call."""
        text, token_ids = self.advance()
        if not delta:
            text, token_ids = self.text, self.token_ids.copy()
        prompt_token_ids = self._prompt_token_ids
        if not prompt_token_ids:
            prompt_token_ids.extend(self.prepared.request.prompt.tolist())
        return RequestOutput(
            request_id=str(self.request_id),
            prompt=self.prepared.prompt,
            prompt_token_ids=prompt_token_ids,
            outputs=[CompletionOutput(0, text, token_ids, self.finish_reason, stop_reason=self.stop_reason)],
            finished=self.finish_reason is not None,
            usage=Usage(len(prompt_token_ids), len(self.token_ids), self.cached_tokens),
        )

    def end(self, end: Finished) -> None:
        """Nothing comes after it."""
        params = self.prepared.request.params
        self.finish_reason = _WORDS[end.reason]
        self.cached_tokens = end.cached
        if end.stop is not None:
            self.stop_reason = params.stop[end.stop]
        elif end.reason is FinishReason.STOP and self.token_ids[-1] in params.stop_token_ids:
            self.stop_reason = self.token_ids[-1]

    def _text_of(self, new: list[int]) -> str:
        if self.tokenizer is None or self._complete:
            return ""
        self._complete = self.finish_reason is not None
        if self._detokenizer is None:
            if self._complete and len(new) == len(self.token_ids):
                text, stops = self.tokenizer.decode(new), self._stops
                return text if stops is None else stops.cut(text, include=self._includes_stop)
            self._detokenizer = self.tokenizer.stream()
            if self._stops is not None:
                self._detokenizer = StopFilter(self._detokenizer, self._stops, include=self._includes_stop)
        text = self._detokenizer.push(new)
        return text + self._detokenizer.flush() if self._complete else text

    @property
    def _stops(self) -> StopStrings | None:
        stops = self.prepared.request.stops
        assert stops is None or isinstance(stops, StopStrings)
        return stops

    @property
    def _includes_stop(self) -> bool:
        return self.prepared.request.params.include_stop_str_in_output


class Collector:
    """Knows the requests that have not ended. The work per record is proportional to its tokens."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._open: dict[int, Generation] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, prepared: Prepared) -> Generation:
        """Expect tokens for this request."""
        generation = Generation(prepared, self._tokenizer)
        self._open[prepared.request_id] = generation
        return generation

    def discard(self, request_id: int) -> bool:
        """Forget a request: what still comes for it is ignored. False if it has ended or is unknown."""
        return self._open.pop(request_id, None) is not None

    def open_ids(self) -> list[int]:
        """The requests that have not ended."""
        return list(self._open)

    def take(self, record: Committed) -> list[Generation]:
        """Book one step's record and return the generations that it changed, ended ones included."""
        opened = self._open
        changed: dict[int, Generation] = {}
        for request_id, token in zip(record.request_ids.tolist(), record.tokens.tolist(), strict=True):
            generation = opened.get(request_id)
            if generation is not None:
                generation.token_ids.append(token)
                changed[request_id] = generation
        for end in record.finished:
            generation = opened.pop(end.request_id, None)
            if generation is not None:
                if end.generated != len(generation.token_ids):
                    raise InternalError(
                        f"request {end.request_id} ended with {end.generated} tokens, "
                        f"but {len(generation.token_ids)} came in"
                    )
                generation.end(end)
                changed[end.request_id] = generation
        return list(changed.values())


def dead_engine(failure: EngineFailure) -> EngineDeadError:
    """A fresh exception for each who waits: a shared one would collect all their tracebacks."""
    error = EngineDeadError(str(failure.error))
    error.__cause__ = failure.error.__cause__
    return error
