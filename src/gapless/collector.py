"""From the engine's records, one per step, to what each request has so far. For one thread at a time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from gapless.engine.core import EngineFailure
from gapless.errors import EngineDeadError, InternalError
from gapless.outcome import Committed, Finished, LogprobLines, PromptLogprobs
from gapless.outputs import CompletionOutput, FinishWord, RequestOutput, TokenLogprob, Usage
from gapless.request import FinishReason, Request
from gapless.text.detokenize import Detokenizer
from gapless.text.stops import StopFilter, StopStrings
from gapless.text.tokenizer import Tokenizer

_WORDS: dict[FinishReason, FinishWord] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "cancelled",
    FinishReason.ERROR: "error",
}


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Prepared:
    """A prompt that was checked and has its ids, but is not queued.

    requests  one for each of its n continuations, to be submitted together and in this order.
    prompt    its text, if it had one.
    echo      what the text of each continuation begins with.
    """

    requests: tuple[Request, ...]
    prompt: str | None
    echo: str = ""

    @property
    def request(self) -> Request:
        """The first one, whose id is the prompt's."""
        return self.requests[0]

    @property
    def request_id(self) -> int:
        return self.requests[0].request_id

    @property
    def request_ids(self) -> list[int]:
        """Of all continuations."""
        return [request.request_id for request in self.requests]


@dataclass(slots=True, eq=False)
class Heard:
    """How many tokens of a continuation came, read or not, and time.monotonic() of the first and the last of them."""

    tokens: int
    first: float
    last: float


@dataclass(slots=True, eq=False)
class Continuation:
    """One of n, as far as it is known. Text is made when somebody asks for it.

    Asked once at the end it is decoded at once; asked along the way it comes from an incremental detokenizer. Both
    give the same text.

    heard   None before its first token
    read    token ids whose text is in `text`
    closed  all of the text is in `text`
    """

    index: int
    request: Request
    tokenizer: Tokenizer | None
    echo: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    finish_reason: FinishWord | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    heard: Heard | None = None
    text: str = ""
    read: int = 0
    closed: bool = False
    restarted: bool = False  # and nothing has been read since
    _stopped: bool = False  # by a stop string
    _stream: Detokenizer | StopFilter | None = None

    @property
    def unread(self) -> bool:
        """Whether there is something new."""
        return not self.closed and (self.restarted or self.finish_reason is not None or len(self.token_ids) > self.read)

    def advance(self) -> CompletionOutput:
        """What is new since the last call. After the end: all that was left."""
        begin, self.read = self.read, len(self.token_ids)
        text = "" if self.closed else self._text_from(begin)
        self.closed = self.finish_reason is not None
        self.text += text
        output = self._output(text, begin, restarted=self.restarted)
        self.restarted = False
        return output

    def restart(self, echo: str) -> None:
        """What there is of the answer is void: it begins again."""
        self.restarted |= self.read > 0
        self.token_ids, self.logprobs = [], []
        self.text, self.read, self.echo, self._stream = "", 0, echo, None

    def whole(self) -> CompletionOutput:
        """All that is known so far."""
        self.advance()
        return self._output(self.text, 0)

    def end(self, end: Finished) -> None:
        """Nothing comes after it."""
        if end.generated != len(self.token_ids):
            raise InternalError(
                f"request {end.request_id} ended with {end.generated} tokens, but {len(self.token_ids)} came in"
            )
        params = self.request.params
        self.finish_reason = _WORDS[end.reason]
        self.error = end.error
        self._stopped = end.stop is not None
        if end.stop is not None:
            self.stop_reason = params.stop[end.stop]
        elif end.reason is FinishReason.STOP and self.token_ids[-1] in params.stop_token_ids:
            self.stop_reason = self.token_ids[-1]

    def _output(self, text: str, begin: int, *, restarted: bool = False) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=self.token_ids[begin:],
            finish_reason=self.finish_reason,
            logprobs=None if self.request.params.logprobs is None else self.logprobs[begin:],
            stop_reason=self.stop_reason,
            error=self.error,
            restarted=restarted,
        )

    def _text_from(self, begin: int) -> str:
        """The text that the tokens from `begin` on add."""
        echo, self.echo = self.echo, ""
        if self.tokenizer is None:
            return echo
        new, ends = self.token_ids[begin:], self.finish_reason is not None
        if self._stream is None:
            if ends:
                whole = self.tokenizer.decode(new)
                return echo + whole[: len(whole) - self._surplus()]
            stream = self.tokenizer.stream()
            self._stream = stream if self._stops is None else StopFilter(stream, self._stops)
        if not ends:
            return echo + self._stream.push(new)
        if isinstance(self._stream, StopFilter):
            return echo + self._stream.finish(new, self._surplus())
        return echo + self._stream.push(new) + self._stream.flush()

    def _surplus(self) -> int:
        """Characters at the end of the text that are left out for a stop string's sake."""
        stops = self._stops
        if not self._stopped or stops is None:
            return 0
        found = stops.locate(np.asarray(self.token_ids, dtype=np.int32))
        if found is None:
            raise InternalError(f"request {self.request.request_id} ended by a stop string that its text has not")
        index, back = found
        return back - len(stops.strings[index]) if self.request.params.include_stop_str_in_output else back

    @property
    def _stops(self) -> StopStrings | None:
        stops = self.request.stops
        assert stops is None or isinstance(stops, StopStrings)
        return stops


class Generation:
    """What is known of one prompt: its continuations, and the log probabilities of its tokens."""

    def __init__(self, prepared: Prepared, tokenizer: Tokenizer | None) -> None:
        self.prepared = prepared
        self.request_id = prepared.request_id
        self.continuations = [
            Continuation(index, request, tokenizer, prepared.echo) for index, request in enumerate(prepared.requests)
        ]
        self.cached_tokens = 0
        self._going_on = len(self.continuations)
        self._prompt_token_ids: list[int] = []
        self._prompt_logprobs: list[TokenLogprob | None] = [None]
        self._begun = False  # an output has been given

    @property
    def finished(self) -> bool:
        return not self._going_on

    @property
    def has_news(self) -> bool:
        """Whether a delta would have something in it."""
        return any(each.unread for each in self.continuations)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        generated = sum([len(each.token_ids) for each in self.continuations])
        return Usage(len(self.prepared.requests[0].prompt), generated, self.cached_tokens)

    def output(self, *, delta: bool = False) -> RequestOutput:
        """All that is known so far; with `delta`, what is new since the last call."""
        outputs = [each.advance() if delta else each.whole() for each in self.continuations if each.unread or not delta]
        prompt_token_ids, request = self._prompt_token_ids, self.prepared.requests[0]
        if not prompt_token_ids:
            prompt_token_ids.extend(request.prompt.tolist())
        scored = request.params.prompt_logprobs is not None and not (delta and self._begun)
        self._begun = True
        return RequestOutput(
            request_id=str(self.request_id),
            prompt=self.prepared.prompt,
            prompt_token_ids=prompt_token_ids,
            outputs=outputs,
            finished=self.finished,
            usage=self.usage,
            prompt_logprobs=self._prompt_logprobs.copy() if scored else None,
        )

    def end(self, continuation: Continuation, end: Finished) -> None:
        """Nothing comes after it for this one."""
        continuation.end(end)
        self._going_on -= 1
        if continuation.index == 0:  # the others share its prompt
            self.cached_tokens = end.cached

    def restart(self, continuation: Continuation) -> None:
        """It begins again, the prompt's log probabilities with the first."""
        continuation.restart(self.prepared.echo)
        if continuation.index == 0:
            self._prompt_logprobs.clear()
            self._prompt_logprobs.append(None)
            self._begun = False

    def add_prompt_logprobs(self, piece: PromptLogprobs) -> None:
        """The next of the prompt's log probabilities."""
        known, count = self._prompt_logprobs, self.prepared.request.params.prompt_logprobs
        if count is None or piece.begin != len(known):
            raise InternalError(
                f"request {piece.request_id} has log probabilities of {len(known)} prompt tokens, "
                f"and those from {piece.begin} on came in"
            )
        lines = _Logprobs(piece.lines)
        known.extend(lines.at(line, count) for line in range(len(piece.lines.ranks_L)))


class Collector:
    """Knows the requests that have not ended. The work per record is proportional to its tokens."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._open: dict[int, Generation] = {}
        self._continuations: dict[int, tuple[Generation, Continuation]] = {}

    def __len__(self) -> int:
        """Prompts that are not finished."""
        return len(self._open)

    def add(self, prepared: Prepared) -> Generation:
        """Expect tokens for this prompt's requests."""
        generation = Generation(prepared, self._tokenizer)
        self._open[prepared.request_id] = generation
        for request_id, each in zip(prepared.request_ids, generation.continuations, strict=True):
            self._continuations[request_id] = generation, each
        return generation

    def discard(self, request_id: int) -> bool:
        """Forget a prompt, by its request id: what still comes for it is ignored. False if it has ended or is
        unknown."""
        generation = self._open.pop(request_id, None)
        if generation is None:
            return False
        for each in generation.prepared.request_ids:
            self._continuations.pop(each, None)
        return True

    def open_ids(self) -> list[int]:
        """The requests that have not ended."""
        return list(self._continuations)

    def take(self, record: Committed) -> list[Generation]:
        """Book one step's record and return the generations that have something new, finished ones included."""
        opened = self._continuations
        changed: dict[int, Generation] = {}
        for request_id in record.restarted:
            if (found := opened.get(request_id)) is not None:
                generation, continuation = found
                generation.restart(continuation)
                changed[generation.request_id] = generation
        for piece in record.prompts:
            generation = self._open.get(piece.request_id)
            if generation is not None:
                generation.add_prompt_logprobs(piece)
        logprobs = None if record.logprobs is None else _Logprobs(record.logprobs)
        now = time.monotonic()
        for place, (request_id, token) in enumerate(
            zip(record.request_ids.tolist(), record.tokens.tolist(), strict=True)
        ):
            found = opened.get(request_id)
            if found is not None:
                generation, continuation = found
                continuation.token_ids.append(token)
                if (heard := continuation.heard) is None:
                    continuation.heard = Heard(1, now, now)
                else:
                    heard.tokens += 1
                    heard.last = now
                if (count := continuation.request.params.logprobs) is not None:
                    continuation.logprobs.append(_logprob_of(token, logprobs, place, count))
                changed[generation.request_id] = generation
        for end in record.finished:
            found = opened.pop(end.request_id, None)
            if found is not None:
                generation, continuation = found
                generation.end(continuation, end)
                changed[generation.request_id] = generation
                if generation.finished:
                    del self._open[generation.request_id]
        return list(changed.values())


class _Logprobs:
    """Lines of log probabilities as Python's numbers."""

    def __init__(self, lines: LogprobLines) -> None:
        self._ids: list[list[int]] = lines.ids_LK.tolist()
        self._logprobs: list[list[float]] = lines.logprobs_LK.tolist()
        self._ranks: list[int] = lines.ranks_L.tolist()

    def at(self, line: int, count: int) -> TokenLogprob:
        """A line with its `count` likeliest tokens, or as many as the vocabulary has."""
        ids, logprobs = self._ids[line], self._logprobs[line]
        top = tuple(zip(ids[1 : count + 1], logprobs[1 : count + 1], strict=True))
        if top and top[-1][0] < 0:
            top = tuple(each for each in top if each[0] >= 0)
        return TokenLogprob(ids[0], logprobs[0], self._ranks[line], top)


def _logprob_of(token: int, logprobs: _Logprobs | None, line: int, count: int) -> TokenLogprob:
    found = None if logprobs is None else logprobs.at(line, count)
    if found is None or found.token_id != token:
        raise InternalError(f"token {token} came without its log probability")
    return found


def dead_engine(failure: EngineFailure) -> EngineDeadError:
    """A fresh exception for each who waits: a shared one would collect all their tracebacks."""
    error = EngineDeadError(str(failure.error))
    error.__cause__ = failure.error.__cause__
    return error
