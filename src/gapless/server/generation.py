"""One HTTP request on its way through the engine: counted, watched, and cancelled when its client leaves."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Self

from fastapi import Request

from gapless.async_llm import AsyncLLM, OutputKind, RequestStream
from gapless.collector import Prepared
from gapless.errors import EngineDeadError, InvalidRequestError
from gapless.loading import Loaded
from gapless.outputs import RequestOutput, Usage
from gapless.params import MAX_N
from gapless.server.context import Context, UnavailableError, Watch
from gapless.server.http.depends import request_id_of
from gapless.server.http.errors import ApiError, ClientGoneError

Batch = Sequence[tuple[int, RequestOutput]]
"""What is ready at one time: the place of a prompt among the request's, and its output."""


class Job:
    """The prompts of one HTTP request. To be ended by whole(), by watching() with next() in it, or by close()."""

    def __init__(self, request: Request, context: Context, count: int) -> None:
        """For `count` answers. Raises BusyError, UnavailableError, InvalidRequestError."""
        if count > context.config.max_open:
            raise InvalidRequestError(
                f"this server gives {context.config.max_open} answers at a time, to all prompts together, not {count}"
            )
        self._request = request
        self._context = context
        self.prepared: Sequence[Prepared] = ()
        self._streams: list[RequestStream] = []
        self._waiting: dict[asyncio.Task[RequestOutput | None], int] = {}
        self._begun = False
        self._finished = 0
        self._reason = ""
        self._watch: Watch | None = None
        self._told: Counter[int] = Counter()  # tokens, by continuation
        self._entered = 0
        self._gone = False
        try:
            for _ in range(count):
                context.enter()
                self._entered += 1
        except BaseException:
            self.close()
            raise

    @classmethod
    async def start(
        cls,
        request: Request,
        context: Context,
        prepare: Callable[[Loaded], Sequence[Prepared]],
        *,
        count: int = 1,
        rows: int = 1,
        stream: bool,
        has_form: bool,
        is_long: bool,
    ) -> Self:
        """Check the prompts and queue them.

        prepare     makes `count` prompts, for `rows` answers each; on a thread if that takes time: where a form is
                    compiled, or much is read.
        stream      whether next() is to be called, else whole().

        Raises what prepare, AsyncLLM.submit() and Context raise, with nothing queued.
        """
        job = cls(request, context, count * rows)
        try:
            llm = context.llm
            if has_form or is_long:
                async with job._leaving_cancels(), context.forms if has_form else nullcontext():
                    prepared = await asyncio.to_thread(prepare, llm.loaded)
            else:
                prepared = prepare(llm.loaded)
            job._submit(llm, prepared, "delta" if stream else "final")
        except BaseException:
            job.close()
            raise
        return job

    @property
    def usage(self) -> Usage:
        """Of all prompts together, as far as it is known."""
        found = [stream.usage for stream in self._streams]
        return Usage(
            sum(each.prompt_tokens for each in found),
            sum(each.completion_tokens for each in found),
            sum(each.cached_tokens for each in found),
        )

    async def whole(self) -> list[RequestOutput]:
        """The outputs in the order of their prompts. Raises ClientGoneError, UnavailableError, EngineDeadError,
        ApiError."""
        outputs: list[RequestOutput] = []
        async with self.watching():
            for stream in self._streams:
                async for output in stream:
                    self._check(output)
                    outputs.append(output)
        if self._gone:
            raise _gone()
        return outputs

    async def next(self) -> Batch | None:
        """What is new; None at the end, or once the client has gone. Who asks late gets more at once. For use inside of
        watching(). Raises UnavailableError, EngineDeadError, ApiError."""
        if len(self._streams) > 1:
            return await self._next_of_many()
        try:
            output = await self._streams[0].__anext__()
        except StopAsyncIteration:
            return None
        self._tell((0,))
        self._check(output)
        return ((0, output),)

    @asynccontextmanager
    async def watching(self) -> AsyncGenerator[None]:
        """The client's leaving cancels the job meanwhile; all is given back behind it."""
        try:
            async with self._leaving_cancels():
                yield
        except EngineDeadError as error:
            if self._context.draining:  # the engine was ended, with what had not finished in time
                raise UnavailableError("the server is shutting down") from error
            raise
        finally:
            for task in self._waiting:
                task.cancel()
            self.close()

    def close(self) -> None:
        """Give all back. What still runs is cancelled."""
        for stream in self._streams:
            stream.cancel()
        while self._entered:
            self._entered -= 1
            self._context.leave()
        if self._watch is not None:
            self._tell(range(len(self._streams)))
            watch, self._watch = self._watch, None
            over = self._finished == len(self._streams)
            watch.ended(self._reason if over else "cancelled" if self._gone else "error", self.usage)

    def _submit(self, llm: AsyncLLM, prepared: Sequence[Prepared], kind: OutputKind) -> None:
        if self._gone:
            raise _gone()
        self.prepared = prepared
        for each in prepared:
            self._streams.append(llm.submit(each, kind))
        request = self._request
        request.state.opened = True
        self._watch = self._context.observer.opened(
            request_id_of(request), request.url.path, traceparent=request.headers.get("traceparent")
        )

    @asynccontextmanager
    async def _leaving_cancels(self) -> AsyncGenerator[None]:
        watcher = asyncio.create_task(self._wait_for_leaving())
        try:
            yield
        finally:
            watcher.cancel()

    async def _wait_for_leaving(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        for stream in self._streams:
            stream.cancel()

    async def _next_of_many(self) -> Batch | None:
        if not self._begun:
            self._begun = True
            self._waiting = {_next_of(stream): place for place, stream in enumerate(self._streams)}
        if not self._waiting:
            return None
        done, _ = await asyncio.wait(self._waiting, return_when=asyncio.FIRST_COMPLETED)
        self._tell([self._waiting[task] for task in done])
        for task in done:
            task.exception()  # the first of them is raised below, and speaks for all
        batch: list[tuple[int, RequestOutput]] = []
        for place, task in sorted(((self._waiting.pop(task), task) for task in done), key=lambda pair: pair[0]):
            output = task.result()
            if output is not None:
                self._check(output)
                batch.append((place, output))
                if not output.finished:
                    self._waiting[_next_of(self._streams[place])] = place
        return batch

    def _check(self, output: RequestOutput) -> None:
        """Raises ApiError, UnavailableError for an end that is no answer."""
        self._finished += output.finished
        for each in output.outputs:
            if each.finish_reason is not None:
                self._reason = each.finish_reason
                if each.finish_reason == "error":
                    raise ApiError(400, f"the answer can not go on: {each.error}", code="answer_failed")
                if each.finish_reason == "cancelled":
                    raise UnavailableError("the server has cancelled this request")

    def _tell(self, places: Iterable[int]) -> None:
        """The watch, of the tokens of these prompts that are new to it, by when they came and not by when they are
        read, so that a slow reader's pauses are its own."""
        assert self._watch is not None
        for place in places:
            for index, heard in self._streams[place].heard:
                of = place * MAX_N + index
                if new := heard.tokens - self._told[of]:
                    self._told[of] = heard.tokens
                    self._watch.tokens(new, of, (heard.first, heard.last))


def _next_of(stream: RequestStream) -> asyncio.Task[RequestOutput | None]:
    async def step() -> RequestOutput | None:
        return await anext(stream, None)

    return asyncio.ensure_future(step())


def _gone() -> ClientGoneError:
    return ClientGoneError("the client has gone")
