"""From a spec to a grammar of a model's tokens, within limits of time and work."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from functools import lru_cache
from typing import Final

import numpy as np
from llguidance import LLMatcher

from gapless.errors import EngineDeadError, GaplessError, InternalError, InvalidRequestError
from gapless.grammar.build import limits, start_deep
from gapless.grammar.matcher import Grammar, short
from gapless.grammar.spec import GrammarSpec
from gapless.grammar.vocabulary import Vocabulary
from gapless.grammar.workers import WorkerError, Workers
from gapless.text.tokenizer import Tokenizer

WHITESPACE: Final = r"[ \t]{1,2}|\r?\n[ \t]{0,64}"
"""Between the parts of JSON, where there is any: bounded, as small models may never stop with it."""

MAX_JOBS: Final = 4  # grammars that are compiled at the same time
SLOW_MASK: Final = 0.03  # seconds for one mask, above which everybody would wait for this grammar
_OWN: Final = '%llguidance {"no_forcing": true}'  # the model chooses how a text is cut into tokens
_ADVICE: Final = (
    ("oneOf", "use anyOf"),
    ("look-a", "write the regex without it"),
    ("lookaround", "write the regex without \\b and without ^ and $ inside of it"),
    ("backreference", "write the regex without them"),
    ("Unimplemented keys", "leave these keys out"),
    ("too big", "make it smaller"),
    ("fuel", "make it simpler"),
    ("too many", "make it simpler"),
    ("allows no token", "nothing that this tokenizer can spell matches it"),
    ("NoExtension", "nothing matches it"),
)


@lru_cache(maxsize=1)
def _vocabulary_of(tokenizer: Tokenizer, size: int, stop_ids: tuple[int, ...]) -> Vocabulary:
    """Kept for the compiler of an engine that takes a dead one's place."""
    return Vocabulary.of(tokenizer._inner, size, stop_ids)  # pyright: ignore[reportPrivateUsage]


class GrammarCompiler:
    """The grammars of one model. Safe to share between threads; the first compile() of all reads the vocabulary.

    A worker compiles a grammar first, in a process that ends if it takes too long (workers.py); then a thread here does
    the same, so that sequences get their states of it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        stop_ids: tuple[int, ...],
        *,
        seconds: float = 5.0,
        cached: int = 64,
        checked: bool = False,
    ) -> None:
        """vocab_size  of the model's logits.

        stop_ids  the model's end-of-sequence ids.
        seconds   the longest that a grammar may take to compile; for others it waits no more than twice as long.
        cached    how many grammars are kept, those that were used last.
        checked   no worker is needed: another compiler has let pass what comes.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = stop_ids
        self._seconds = seconds
        self._cached = cached
        self._checked = checked
        self._vocabulary: Vocabulary | None = None
        self._workers = Workers(seconds)
        self._made: OrderedDict[GrammarSpec, Grammar] = OrderedDict()
        self._jobs: dict[GrammarSpec, _Job] = {}
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._free = threading.BoundedSemaphore(MAX_JOBS)

    def compile(self, spec: GrammarSpec) -> Grammar:
        """The grammar of this spec; equal specs share one. Raises InvalidRequestError with what to change, and
        EngineDeadError after close().
        """
        self.read_vocabulary()
        with self._lock:
            grammar = self._made.get(spec)
            if grammar is not None and not grammar.spoiled:
                self._made.move_to_end(spec)
                return grammar
            job = self._jobs.get(spec)
        if job is None:
            job = self._begin(spec)
        job.done.wait()
        if job.grammar is None:
            raise type(job.error)(str(job.error))
        return job.grammar

    def close(self) -> None:
        """End the workers, and whatever they are at. May be called again."""
        self._workers.close()

    def read_vocabulary(self) -> Vocabulary:
        """Read the tokens now, some tenths of a second, and not at the first request. Raises InvalidRequestError."""
        with self._reading:
            if self._vocabulary is None:
                self._vocabulary = _vocabulary_of(self._tokenizer, self._vocab_size, tuple(self._stop_ids))
            return self._vocabulary

    def _check(self, spec: GrammarSpec, source: str) -> None:
        """Let a worker compile it first. Raises InvalidRequestError and EngineDeadError."""
        try:
            error = self._workers.check(self.read_vocabulary().packed, source)
        except WorkerError as ended:
            if not ended.killed:
                raise
            what = f"takes longer than {self._seconds:g} s" if ended.late else "needs too much memory or is too deep"
            raise InvalidRequestError(f"{spec.kind} {what} to compile; make it smaller or simpler") from None
        if error:
            raise _refusal(spec, error)

    def _begin(self, spec: GrammarSpec) -> _Job:
        if not self._free.acquire(timeout=2 * self._seconds):
            raise InvalidRequestError(f"{MAX_JOBS} grammars are being compiled already; try again later")
        with self._lock:
            job = self._jobs.get(spec)
            if job is not None:
                self._free.release()
                return job
            job = self._jobs[spec] = _Job()
        try:
            start_deep(threading.Thread(target=self._run, args=(spec, job), name="gapless-grammar", daemon=True))
        except InternalError as error:
            with self._lock:
                del self._jobs[spec]
            self._free.release()
            job.error = InvalidRequestError(f"{spec.kind} can not be compiled: {error}")
            job.done.set()
        return job

    def _run(self, spec: GrammarSpec, job: _Job) -> None:
        try:
            job.grammar = self._compiled(spec)
        except (InvalidRequestError, EngineDeadError) as error:
            job.error = error
        except BaseException as error:  # noqa: BLE001 - a panic of the library is no Exception; it refuses the request
            job.error = InvalidRequestError(f"{spec.kind} can not be compiled: {short(str(error))}")
        finally:
            with self._lock:
                del self._jobs[spec]
                if job.grammar is not None:
                    self._made[spec] = job.grammar
                    while len(self._made) > self._cached:
                        self._made.popitem(last=False)
            self._free.release()
            job.done.set()

    def _compiled(self, spec: GrammarSpec) -> Grammar:
        vocabulary = self.read_vocabulary()
        source = source_of(spec)
        if not self._checked:
            self._check(spec, source)

        def build() -> LLMatcher:
            return LLMatcher(vocabulary.table, source, log_level=0, limits=limits())

        begin = time.monotonic()
        first = build()
        if first.is_error():
            raise _refusal(spec, first.get_error())
        grammar = Grammar(build, first, time.monotonic() - begin, vocabulary, self._stop_ids or (vocabulary.end_id,))
        if min(self._first_mask(spec, grammar) for _ in range(2 * grammar.shares)) > SLOW_MASK:
            raise InvalidRequestError(f"{spec.kind} takes more than {SLOW_MASK:g} s for a token; make it simpler")
        return grammar

    def _first_mask(self, spec: GrammarSpec, grammar: Grammar) -> float:
        """Fill the mask of a new sequence, which takes longer the first time. Returns seconds."""
        matcher = grammar.matcher()
        mask_W = np.zeros(grammar.vocabulary.words, dtype=np.int32)
        begin = time.monotonic()
        matcher.fill(mask_W)
        if matcher.error is not None:
            raise _refusal(spec, matcher.error)
        return time.monotonic() - begin


class _Job:
    """A grammar in the making, and who waits for it."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.grammar: Grammar | None = None
        self.error: GaplessError = InternalError("a grammar that is not done was asked for")


def source_of(spec: GrammarSpec) -> str:
    """The spec in the library's words."""
    if spec.kind == "regex":
        lark: str = json.loads(LLMatcher.grammar_from_regex(spec.text))["grammars"][0]["lark_grammar"]
    elif spec.kind == "choice":
        choices: list[str] = json.loads(spec.text)
        lark = "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in choices)
    elif spec.kind == "grammar":
        lark = spec.text
    else:
        options = {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}
        schema = {"x-guidance": options, **json.loads(spec.text)}
        lark = "start: %json " + json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    return json.dumps({"grammars": [{"lark_grammar": f"{lark}\n{_OWN}\n"}]}, ensure_ascii=False)


def _refusal(spec: GrammarSpec, message: str) -> InvalidRequestError:
    lines = message.split("\n")
    if spec.kind != "grammar":  # the lines that it quotes are not the caller's
        lines = [_PLACE.sub("", line) for line in lines if not _QUOTED.match(line)]
    text = short("\n".join(line for line in lines if _OWN not in line))
    advice = next((f" ({advice})" for mark, advice in _ADVICE if mark in text), "")
    return InvalidRequestError(f"{spec.kind} can not be compiled{advice}: {text}")


_PLACE: Final = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
_QUOTED: Final = re.compile(r"\s*(\d+ \||\^\s*$)")
