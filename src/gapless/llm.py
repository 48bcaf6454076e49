"""LLM: prompts in, text out, in one call or as it comes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import Self, Unpack, cast

from torch import Tensor

from gapless.collector import Collector, Generation, Prepared, dead_engine
from gapless.config import EngineConfig
from gapless.engine.core import EngineFailure, EngineStats, InFlight
from gapless.errors import InvalidRequestError
from gapless.loading import EngineOptions, Load, LoadedEngine, engine_config, load_engine
from gapless.logits_processor import LogitsProcessor
from gapless.outcome import Committed
from gapless.outputs import RequestOutput, TextDelta
from gapless.params import SamplingParams
from gapless.progress import Progress
from gapless.prompts import ChatPrompt, Prompt, is_single
from gapless.text.messages import Message
from gapless.turns import TurnLine

_SUBMIT_AT_ONCE = 64

Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model with its engine.

    llm = LLM("demo")
    print(llm.generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text)

    model      local folder, .gguf file, hub id, or "demo" (SmolLM2-135M-Instruct).
    load       "random" fills the model with random numbers instead of its weights.
    shape      with load="random": a named shape or a config.json; it brings no tokenizer.
    tokenizer  a folder with a tokenizer.json to use in place of the model's.
    logits_processors  code of your own between scores and choice: see gapless.LogitsProcessor.
    config     how the engine runs it; `options` are its fields by name and go over it.

    Threads may share an LLM: calls take turns, first come, first served. An unfinished stream keeps its turn until it
    is read to its end, closed or dropped; a call that waits for one that is not read on says so in the log ("gapless").
    For many streams at once there is AsyncLLM. No signal handlers are installed: KeyboardInterrupt cancels what the
    interrupted call has not finished, and goes on to its caller; the LLM stays usable.

    Raises ConfigError, ModelError, OutOfMemoryError.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "demo",
        *,
        load: Load = "auto",
        shape: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        config: EngineConfig | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        **options: Unpack[EngineOptions],
    ) -> None:
        merged = engine_config(config, options)
        self._start(
            load_engine(model, merged, load=load, shape=shape, tokenizer=tokenizer, logits_processors=logits_processors)
        )

    @classmethod
    def from_loaded(cls, loaded: LoadedEngine) -> Self:
        """Around an engine that was put together elsewhere, which this LLM then owns."""
        llm = cls.__new__(cls)
        llm._start(loaded)
        return llm

    def _start(self, loaded: LoadedEngine) -> None:
        self.loaded = loaded
        self._engine = loaded.engine
        weakref.finalize(self, loaded.engine.request_stop)
        self._turns = TurnLine()
        self._unused = weakref.WeakSet[Prepared]()  # prepared here, and not drawn by a run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------ many prompts

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer one prompt or many; results are in the order of the prompts.

        prompts          a text, token ids, {"prompt": ...}, {"prompt_token_ids": ...}, {"messages": ...}, or a list
                         of these.
        sampling_params  for all, or one for each prompt.
        use_tqdm         a progress bar on stderr; None: if that is a terminal.

        Raises InvalidRequestError if any request is wrong, with nothing queued; EngineDeadError.
        """
        prepared = self._prepare_all(prompts, sampling_params)
        done: dict[str, RequestOutput] = {}
        with Progress(len(prepared), use_tqdm) as progress, closing(self.run(prepared, progress=progress)) as outputs:
            for output in outputs:
                done[output.request_id] = output
        return [done[str(each.request_id)] for each in prepared]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, through the model's chat template. Otherwise like generate()."""
        return self.generate(_conversations(messages), sampling_params, use_tqdm=use_tqdm)

    def generate_iter(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None
    ) -> Generator[tuple[int, RequestOutput]]:
        """generate() with each result, and the place of its prompt, as soon as it is there.

        Everything is validated before this returns. Leaving the iterator cancels the rest.
        """
        return self._generate_iter(self._prepare_all(prompts, sampling_params))

    def _generate_iter(self, prepared: list[Prepared]) -> Generator[tuple[int, RequestOutput]]:
        places = {str(each.request_id): place for place, each in enumerate(prepared)}
        with closing(self.run(prepared)) as outputs:
            for output in outputs:
                yield places[output.request_id], output

    # ---------------------------------------------------------------- streams

    def stream(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None) -> Generator[TextDelta]:
        """Text as it comes, of all prompts and their continuations at once. Leaving the iterator cancels the rest.

        Everything is validated before this returns. Raises InvalidRequestError; on the way EngineDeadError.
        """
        return self._stream(self._prepare_all(prompts, sampling_params))

    def _stream(self, prepared: list[Prepared]) -> Generator[TextDelta]:
        places = {each.request_id: place for place, each in enumerate(prepared)}
        with closing(self._drive(prepared, None)) as steps:
            for _, changed in steps:
                for generation in changed:
                    place = places[generation.request_id]
                    output = generation.output(delta=True)
                    prompt_logprobs = output.prompt_logprobs
                    for new in output.outputs:
                        yield TextDelta(
                            index=place,
                            text=new.text,
                            token_ids=new.token_ids,
                            finish_reason=new.finish_reason,
                            continuation=new.index,
                            logprobs=new.logprobs,
                            error=new.error,
                            restarted=new.restarted,
                            prompt_logprobs=prompt_logprobs,
                        )
                        prompt_logprobs = None

    # ------------------------------------------------- for long lists of work

    def prepare(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Prepared:
        """Check one prompt and give it its ids, for one run(). Nothing is queued. Raises InvalidRequestError."""
        prepared = self.loaded.prepare(prompt, sampling_params)
        self._unused.add(prepared)
        return prepared

    def run(
        self, prepared: Iterable[Prepared | None], *, window: int | None = None, progress: Progress | None = None
    ) -> Generator[RequestOutput]:
        """Results as they are finished, of prompts from prepare() that are drawn from an iterable as room comes up.

        window  most prompts drawn and not finished; None: all at once.
        A None from `prepared` says that nothing is there yet: it is asked again after the next step of the engine, or
        at once if nothing is running, so then it should wait.

        Raises InvalidRequestError if one was prepared by another LLM or drawn before, which cancels the rest of this
        run and nothing else; EngineDeadError.
        """
        with closing(self._drive(prepared, window)) as steps:
            for record, changed in steps:
                ended = [each for each in changed if each.finished]
                for generation in ended:
                    yield generation.output()
                if progress is not None:
                    progress.advance(tokens=record.tokens.size, running=len(changed) - len(ended), finished=len(ended))

    def stats(self) -> EngineStats:
        """Counts and times of the engine since it was started."""
        return self._engine.stats()

    # ------------------------------------------------------- between steps

    def pause(self) -> None:
        """Stop generating after the steps in hand, from any thread; what runs keeps what it has. See resume().

        Returns once nothing runs on the device. Raises EngineDeadError.
        """
        self._engine.pause()

    def resume(self) -> None:
        """Go on after pause(). Raises ConfigError while the model sleeps; EngineDeadError."""
        self._engine.resume()

    def update_weights(self, tensors: Mapping[str, Tensor], *, in_flight: InFlight = "finish") -> None:
        """Put new values into the model's weights, in place, between two steps, from any thread.

        tensors    by their Hugging Face names, all or some; on any device, in any float type.
        in_flight  what becomes of requests that have begun: "finish", they end first with the old weights while new
                   ones wait; "continue", their KV is computed again and they go on after the tokens they have;
                   "restart", they begin again, and streams get a delta that is `restarted`.

        Raises CorruptModelError for a name or a shape that the model does not have, with nothing changed;
        ConfigError while the model sleeps; EngineDeadError.
        """
        self._engine.update_weights(tensors, in_flight=in_flight)

    def sleep(self) -> None:
        """Pause, and give the memory of weights, KV cache and graphs back to the device; the weights go to the host's.

        What runs is computed again after wake(). On a CPU nothing is given back. Raises EngineDeadError.
        """
        self._engine.sleep()

    def wake(self) -> None:
        """Undo sleep(), and go on. Raises OutOfMemoryError if the memory is not free any more: the model sleeps on
        then; EngineDeadError."""
        self._engine.wake()

    def close(self) -> None:
        """End the engine; a call that still waits in another thread gets EngineDeadError. May be called again.

        Waits for the step in hand: at most stall_seconds, and 5 s while KeyboardInterrupt or SystemExit is handled.
        """
        self.loaded.forms.close()
        self._engine.close()

    # --------------------------------------------------------------- internal

    def _prepare_all(self, prompts: Prompt | Sequence[Prompt], params: Params) -> list[Prepared]:
        many: list[Prompt] = [prompts] if is_single(prompts) else list(cast("Sequence[Prompt]", prompts))
        if params is None or isinstance(params, SamplingParams):
            each: list[SamplingParams | None] = [params] * len(many)
        else:
            each = list(params) if isinstance(params, Sequence) else [cast("SamplingParams", params)]
            for one in each:
                if not isinstance(one, SamplingParams):
                    raise InvalidRequestError(f"sampling_params must be SamplingParams, not {type(one).__name__}")
        if len(each) != len(many):
            raise InvalidRequestError(f"{len(many)} prompts came with {len(each)} sampling parameters")
        prepared: list[Prepared] = []
        for place, (prompt, chosen) in enumerate(zip(many, each, strict=True)):
            try:
                prepared.append(self.prepare(prompt, chosen))
            except InvalidRequestError as error:
                if len(many) == 1:
                    raise
                raise type(error)(f"prompt {place}: {error}") from error
        return prepared

    def _drive(
        self, prepared: Iterable[Prepared | None], window: int | None
    ) -> Generator[tuple[Committed, list[Generation]]]:
        """Keep up to `window` prompts in the engine; give each step's record and the generations it changed."""
        with self._turns.turn(self._engine.check_alive) as turn:
            collector = Collector(self.loaded.tokenizer)
            source = iter(prepared)
            try:
                while True:
                    more = self._refill(source, collector, window)
                    if not collector and more is None:
                        return
                    record = self._next_record(wait=bool(collector) and not more)
                    if record is not None:
                        changed = collector.take(record)
                        with turn.away():
                            yield record, changed
            finally:
                self._engine.cancel(collector.open_ids())

    def _refill(self, source: Iterator[Prepared | None], collector: Collector, window: int | None) -> bool | None:
        """Submit a few. True if there may be more at once, False if not before the next step, None if never."""
        room = _SUBMIT_AT_ONCE if window is None else min(_SUBMIT_AT_ONCE, window - len(collector))
        batch: list[Prepared] = []
        more: bool | None = True
        while len(batch) < room and more:
            try:
                following = next(source)
            except StopIteration:
                more = None
            else:
                if following is None:
                    more = False
                else:
                    self._use(following)
                    batch.append(following)
        for each in batch:
            collector.add(each)
        if batch:
            self._engine.submit(request for each in batch for request in each.requests)
        return more if room > 0 else False

    def _use(self, prepared: Prepared) -> None:
        """Each of them runs once, and where its limits were checked."""
        if prepared not in self._unused:
            raise InvalidRequestError(
                f"request {prepared.request_id} was prepared by another LLM, or was given to run() before. "
                "Call prepare() of this LLM for each request of a run"
            )
        self._unused.discard(prepared)

    def _next_record(self, *, wait: bool) -> Committed | None:
        record = self._engine.next_output(wait=wait)
        if isinstance(record, EngineFailure):
            raise dead_engine(record)
        return record


def _conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Prompt]:
    if all(isinstance(each, Mapping) for each in messages) and messages:
        return [ChatPrompt(messages=cast("Sequence[Message]", messages))]
    return [ChatPrompt(messages=each) for each in cast("Sequence[Sequence[Message]]", messages)]
