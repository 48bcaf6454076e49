"""AsyncLLM: one asynchronous iterator per request, many at once on one event loop."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Literal, Self, Unpack

from torch import Tensor

from gapless.collector import Collector, Generation, Heard, Prepared, dead_engine
from gapless.config import EngineConfig
from gapless.engine.core import EngineFailure, EngineStats, InFlight, patience
from gapless.engine.handle import EngineHandle
from gapless.errors import EngineDeadError, GaplessError, InvalidRequestError
from gapless.loading import EngineOptions, Load, Loaded, engine_config, load_engine
from gapless.logits_processor import LogitsProcessor
from gapless.outcome import Committed
from gapless.outputs import RequestOutput, Usage
from gapless.params import SamplingParams
from gapless.prompts import Prompt

OutputKind = Literal["cumulative", "delta", "final"]


class AsyncLLM:
    """A model with its engine for one event loop: the one that runs when generate() is first called.

    async with await AsyncLLM.create("demo") as llm:
        async for output in llm.generate("The capital of France is"):
            print(output.outputs[0].text)

    The arguments are those of LLM. The constructor blocks while the model loads; create() does not. All methods but
    the constructor and close() belong to the loop's thread.
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
    async def create(
        cls,
        model: str | os.PathLike[str] = "demo",
        *,
        load: Load = "auto",
        shape: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        config: EngineConfig | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        **options: Unpack[EngineOptions],
    ) -> Self:
        """Load in a thread, while the event loop goes on."""
        merged = engine_config(config, options)
        return cls.from_loaded(
            await asyncio.to_thread(
                load_engine,
                model,
                merged,
                load=load,
                shape=shape,
                tokenizer=tokenizer,
                logits_processors=logits_processors,
            )
        )

    @classmethod
    def from_loaded(cls, loaded: Loaded) -> Self:
        """Around an engine that was put together elsewhere, which this AsyncLLM then owns."""
        llm = cls.__new__(cls)
        llm._start(loaded)
        return llm

    def _start(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self._engine = loaded.engine
        self._desk = _Desk(loaded)
        weakref.finalize(self, loaded.engine.request_stop)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, output_kind: OutputKind = "cumulative"
    ) -> RequestStream:
        """Queue one request and return the iterator of its outputs. Chats are prompts too: {"messages": ...}.

        output_kind  "cumulative": every output has all text and token ids so far, of all n continuations; "delta":
                     only what is new, of those that have something new; "final": one output, at the end.

        A consumer that is slower than the engine gets fewer and longer outputs. The last output is `finished`.
        Leaving the iterator (break, aclose(), cancelling the task) cancels the request.

        Raises InvalidRequestError or EngineDeadError with nothing queued. The iterator raises EngineDeadError.
        """
        return self.submit(self.loaded.prepare(prompt, sampling_params), output_kind)

    def submit(self, prepared: Prepared, output_kind: OutputKind = "cumulative") -> RequestStream:
        """generate() for a prompt that `loaded.prepare` has checked, maybe in a thread: where the answer's form is new,
        or the prompt long, that takes time. Raises InvalidRequestError or EngineDeadError with nothing queued."""
        if output_kind not in ("cumulative", "delta", "final"):
            raise InvalidRequestError(f"output_kind must be cumulative, delta or final, not {output_kind!r}")
        self._desk.attach(asyncio.get_running_loop())
        return RequestStream(self, self._desk, self._desk.submit(prepared), output_kind)

    def attach(self) -> None:
        """Belong to the running event loop from now on, before the first request."""
        self._desk.attach(asyncio.get_running_loop())

    @property
    def num_open(self) -> int:
        """Prompts that are not finished and were not left."""
        return self._desk.num_open

    def stats(self) -> EngineStats:
        """Counts and times of the engine since it was started."""
        return self._engine.stats()

    async def pause(self) -> None:
        """Stop generating after the steps in hand. The methods from here to wake() are those of LLM."""
        await asyncio.to_thread(self._engine.pause)

    async def resume(self) -> None:
        """Go on after pause()."""
        await asyncio.to_thread(self._engine.resume)

    async def update_weights(self, tensors: Mapping[str, Tensor], *, in_flight: InFlight = "finish") -> None:
        """New values for the model's weights, in place, between two steps."""
        await asyncio.to_thread(self._engine.update_weights, tensors, in_flight=in_flight)

    async def sleep(self) -> None:
        """Pause, and give memory back to the device."""
        await asyncio.to_thread(self._engine.sleep)

    async def wake(self) -> None:
        """Undo sleep(), and go on."""
        await asyncio.to_thread(self._engine.wake)

    def close(self) -> None:
        """End the engine, waiting for the step in hand. Iterators that still wait raise EngineDeadError.

        Waits at most stall_seconds, and 5 s while KeyboardInterrupt, SystemExit or CancelledError is handled.
        """
        self._close(patience())

    async def aclose(self) -> None:
        """close() without blocking the event loop."""
        await asyncio.to_thread(self._close, patience())

    def _close(self, wait_seconds: float) -> None:
        self.loaded.forms.close()
        self._engine.close(wait_seconds)
        self._desk.join()


class RequestStream(AsyncIterator[RequestOutput]):
    """The outputs of one request, for one task. Left before its end, it cancels the request."""

    def __init__(self, owner: AsyncLLM, desk: _Desk, generation: Generation, kind: OutputKind) -> None:
        self._owner = owner  # which ends its engine when it is dropped
        self._desk = desk
        self._generation = generation
        self._kind: OutputKind = kind
        self._over = False

    @property
    def request_id(self) -> str:
        return str(self._generation.request_id)

    @property
    def usage(self) -> Usage:
        """Tokens so far, those included that were not read."""
        return self._generation.usage

    @property
    def heard(self) -> list[tuple[int, Heard]]:
        """Of each continuation that has tokens, read or not: its index, and when they came."""
        return [(each.index, each.heard) for each in self._generation.continuations if each.heard is not None]

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._over:
            raise StopAsyncIteration
        generation = self._generation
        if self._desk.is_waiting(generation.request_id):
            raise InvalidRequestError("two tasks read from one request's iterator")
        try:
            while not self._ready():
                await self._desk.changed(generation.request_id, at_end=self._kind == "final")
                if self._over:  # cancelled by another task
                    raise StopAsyncIteration
        except BaseException:
            self.cancel()
            raise
        self._over = generation.finished
        return generation.output(delta=self._kind == "delta")

    def cancel(self) -> None:
        """Cancel the request, if it has not ended; nothing more comes, and a task that waits for more is released."""
        self._over = True
        self._desk.cancel(self._generation)

    async def aclose(self) -> None:
        """cancel(), under the name that asynchronous generators have."""
        self.cancel()

    def __del__(self) -> None:
        if not self._over:
            self._desk.abandon(self._generation)

    def _ready(self) -> bool:
        generation = self._generation
        return generation.finished or (self._kind != "final" and generation.has_news)


class _Desk:
    """Between the engine and the event loop. One thread carries each step's record over, in one call per step; all
    else happens on the loop, so nothing here needs a lock."""

    def __init__(self, loaded: Loaded) -> None:
        self._engine: EngineHandle = loaded.engine
        self._collector = Collector(loaded.tokenizer)
        self._waiting: dict[int, tuple[asyncio.Future[None], bool]] = {}
        self._failure: EngineFailure | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is None:
            self._loop = loop
            self._thread = threading.Thread(target=self._carry, args=(loop,), name="gapless-outputs", daemon=True)
            self._thread.start()
        elif self._loop is not loop:
            raise InvalidRequestError("this AsyncLLM belongs to another event loop: make one AsyncLLM for each loop")

    @property
    def num_open(self) -> int:
        return len(self._collector)

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def submit(self, prepared: Prepared) -> Generation:
        generation = self._collector.add(prepared)
        try:
            self._engine.submit(prepared.requests)
        except GaplessError:
            self._collector.discard(prepared.request_id)
            raise
        return generation

    async def changed(self, request_id: int, *, at_end: bool) -> None:
        """Wait for the request's next tokens, or for its end."""
        if self._failure is not None:
            raise dead_engine(self._failure)
        assert self._loop is not None
        future = self._loop.create_future()
        self._waiting[request_id] = (future, at_end)
        try:
            await future
        finally:
            self._waiting.pop(request_id, None)

    def is_waiting(self, request_id: int) -> bool:
        return request_id in self._waiting

    def cancel(self, generation: Generation) -> None:
        if self._collector.discard(generation.request_id):
            self._engine.cancel(generation.prepared.request_ids)
            self._wake([generation.request_id])

    def abandon(self, generation: Generation) -> None:
        """cancel() for the garbage collector, which may run in any thread."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self.cancel, generation)
        except RuntimeError:  # the loop is closed
            self._engine.cancel(generation.prepared.request_ids)

    def _carry(self, loop: asyncio.AbstractEventLoop) -> None:
        """The thread's work, until the engine's last record."""
        last = False
        while not last:
            record = self._engine.next_output()
            assert record is not None
            last = isinstance(record, EngineFailure)
            try:
                loop.call_soon_threadsafe(self._deliver, record)
            except RuntimeError:  # the loop is closed: nobody waits any more
                self._engine.cancel(self._collector.open_ids())

    def _deliver(self, record: Committed | EngineFailure) -> None:
        try:
            self._book(record)
        except Exception as error:  # noqa: BLE001 - a record that does not fit ends the engine, and everybody is told
            self._engine.request_stop()
            failure = EngineDeadError(f"the engine's output makes no sense: {error}")
            failure.__cause__ = error
            self._book(EngineFailure(failure))

    def _book(self, record: Committed | EngineFailure) -> None:
        if isinstance(record, EngineFailure):
            self._failure = self._failure or record
            self._wake(list(self._waiting))
        else:
            self._wake(
                each.request_id
                for each in self._collector.take(record)
                if each.request_id in self._waiting and (each.finished or not self._waiting[each.request_id][1])
            )

    def _wake(self, request_ids: Iterable[int]) -> None:
        for request_id in request_ids:
            future, _ = self._waiting.get(request_id, (None, False))
            if future is not None and not future.done():
                future.set_result(None)
