"""The engine: the loop on a thread of its own, an inbox in front of it and a queue of what became known behind it."""

from __future__ import annotations

import atexit
import queue
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from gapless.engine.admission import Admission
from gapless.engine.loop import Loop
from gapless.errors import ConfigError, EngineDeadError
from gapless.outcome import Committed
from gapless.request import Request, SamplingParams
from gapless.scheduler import SchedulerStats


@dataclass(frozen=True, slots=True)
class EngineFailure:
    """The last thing an engine publishes when it dies. `error` is what every unfinished request ends with."""

    error: EngineDeadError


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts and times since the start of the engine.

    busy_seconds            time that the compute stream spent in compute stages, by device events
    active_seconds          wall time during which there was work
    seconds_since_progress  wall time since the last step ended or work came, 0.0 without work. More than a step can
                            take means that the engine is stalled
    """

    scheduler: SchedulerStats
    busy_seconds: float
    active_seconds: float
    seconds_since_progress: float

    @property
    def busy_share(self) -> float:
        """Part of the active wall time that the compute stream was computing, 0 to 1."""
        return self.busy_seconds / self.active_seconds if self.active_seconds else 0.0


class Engine:
    """Takes validated requests from any thread and publishes tokens in batches, one record per step.

    `outputs` carries Committed records, and at last an EngineFailure if the engine dies. One consumer reads it.
    """

    def __init__(self, loop: Loop, admission: Admission) -> None:
        self.admission = admission
        self.outputs: queue.SimpleQueue[Committed | EngineFailure] = queue.SimpleQueue()
        self._loop = loop
        self._loop.publish = self.outputs.put
        self._inbox: queue.SimpleQueue[Request | int] = queue.SimpleQueue()  # an int is a request id to cancel
        self._wake = threading.Event()
        self._closing = False
        self._error: BaseException | None = None
        self._active_seconds = 0.0
        self._active_since: float | None = None
        self._progress_at = 0.0
        self._thread = threading.Thread(target=self._run, name="gapless-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a worker inside torch must not outlive the interpreter

    # ------------------------------------------------------------ any thread

    def make_request(self, prompt_token_ids: Sequence[int] | NDArray[Any], params: SamplingParams) -> Request:
        """Check a request and give it an id; see Admission.make_request. Nothing is queued."""
        return self.admission.make_request(prompt_token_ids, params)

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests made by make_request, in this order. Raises EngineDeadError."""
        self.check_alive()
        for request in requests:
            self._inbox.put(request)
        self._wake.set()

    def cancel(self, request_ids: Iterable[int]) -> None:
        """End these requests as soon as the loop sees it; each still gets its one Finished. Ended ones are ignored."""
        for request_id in request_ids:
            self._inbox.put(request_id)
        self._wake.set()

    @property
    def alive(self) -> bool:
        return self._error is None and not self._closing and self._thread.is_alive()

    def check_alive(self) -> None:
        """Raises EngineDeadError if the engine has failed or was closed."""
        if not self.alive:
            raise self._death()

    def stats(self) -> EngineStats:
        """A snapshot; exact once the engine is idle."""
        active, since, progress_at = self._active_seconds, self._active_since, self._progress_at
        now, stalled = time.perf_counter(), 0.0
        if since is not None:
            active += now - since
            stalled = now - max(since, progress_at)
        return EngineStats(replace(self._loop.scheduler.stats), self._loop.slots.busy_seconds, active, stalled)

    def set_lookahead(self, lookahead: int) -> None:
        """Run with fewer steps in flight than the engine was built for, or with all again. Only while idle.

        Lets both sides of a comparison use the same slots, graphs and memory.
        """
        if not 0 <= lookahead < len(self._loop.slots.slots):
            raise ConfigError(f"lookahead must be 0 to {len(self._loop.slots.slots) - 1} here, not {lookahead}")
        self._loop.lookahead = lookahead

    def request_stop(self) -> None:
        """close() without waiting: safe in a finalizer, whatever thread that runs on."""
        self._closing = True
        self._wake.set()

    def close(self) -> None:
        """Stop after the step in hand; unfinished requests end with EngineDeadError. May be called again."""
        self._closing = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # --------------------------------------------------------- engine thread

    def _run(self) -> None:
        try:
            while not self._closing:
                self._wait_for_work()
                self._intake()
                while self._loop.has_work and not self._closing:
                    self._loop.step()
                    self._progress_at = time.perf_counter()
                    self._intake()
        except BaseException as error:  # noqa: BLE001 - reported to every waiting request
            self._error = error
        finally:
            try:
                self._loop.close()
            except BaseException as error:  # noqa: BLE001 - a device that failed often fails again when it is closed
                self._error = self._error or error
            finally:
                self._stop_clock()
                _drop_locals(self._error)
                atexit.unregister(self.close)
                self.outputs.put(EngineFailure(self._death()))

    def _wait_for_work(self) -> None:
        """Sleep until there is something in the inbox. The only place where an idle engine waits."""
        self._stop_clock()
        self._wake.wait()
        self._active_since = time.perf_counter()

    def _stop_clock(self) -> None:
        """There is no work from now on."""
        if self._active_since is not None:
            self._active_seconds += time.perf_counter() - self._active_since
            self._active_since = None

    def _intake(self) -> None:
        """Hand new requests and cancels to the scheduler."""
        if not self._wake.is_set():
            return
        self._wake.clear()
        scheduler = self._loop.scheduler
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, Request):
                scheduler.add(command)
            else:
                scheduler.cancel(command)
        if finished := scheduler.take_finished():
            self.outputs.put(Committed.without_tokens(finished))

    def _death(self) -> EngineDeadError:
        if self._error is None:
            return EngineDeadError("the engine was closed")
        error = EngineDeadError(f"the engine failed: {type(self._error).__name__}: {self._error}")
        error.__cause__ = self._error
        return error


def _drop_locals(error: BaseException | None) -> None:
    """Empty the frames of an error and of what led to it: they hold the model, and callers hold the error."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        traceback.clear_frames(error.__traceback__)
        seen.append(error)
        error = error.__cause__ or error.__context__
