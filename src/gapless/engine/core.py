"""The engine: the loop on a thread of its own, an inbox in front of it and a queue of what became known behind it."""

from __future__ import annotations

import atexit
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from gapless.device.faults import ruins_process
from gapless.engine.admission import Admission
from gapless.engine.loop import Loop
from gapless.errors import ConfigError, EngineDeadError
from gapless.outcome import Committed
from gapless.request import Request, SamplingParams, StopTexts
from gapless.scheduler import SchedulerStats

RUINED = "The GPU can not be used by this process any more: start the process again"
GRACE_SECONDS = 5.0  # at most, from the first overdue look at a stall to the engine's death
LEAVE_SECONDS = 5.0  # that close() waits for the device when the process ends or is interrupted


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
                            take means that the engine is stalled; EngineConfig.stall_seconds gives it up
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

    `outputs` carries Committed records, and at last an EngineFailure if the engine dies. One consumer reads it, through
    next_output(), which also notices a stall: a device that ends no step holds the engine's thread in its one wait, so
    those who wait for the engine must look at the clock.

    stall_seconds  time without progress after which the engine is given up, a short grace later; 0: never.
    """

    def __init__(self, loop: Loop, admission: Admission, stall_seconds: float = 0.0) -> None:
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
        self._stall_seconds = stall_seconds
        self._overdue = (0.0, 0.0)  # the progress mark that was found overdue, and when
        self._left_behind = False  # the thread: it may never come back, nobody waits for it
        self._last_word = threading.Lock()  # taken for good by who publishes the failure
        self._told = False  # the failure has been published
        self._ended = threading.Event()  # the thread has nothing left to do
        self._thread = threading.Thread(target=self._run, name="gapless-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close, LEAVE_SECONDS)  # a worker inside torch must not outlive the interpreter

    # ------------------------------------------------------------ any thread

    def make_request(
        self,
        prompt_token_ids: Sequence[int] | NDArray[Any],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        stops: StopTexts | None = None,
    ) -> Request:
        """Check a request and give it an id; see Admission.make_request. Nothing is queued."""
        return self.admission.make_request(
            prompt_token_ids, params, priority=priority, cache_salt=cache_salt, stops=stops
        )

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
        """Raises EngineDeadError if the engine has failed, stalled or was closed."""
        self._look_for_stall()
        if not self.alive:
            raise self._death()

    def next_output(self, *, wait: bool = True) -> Committed | EngineFailure | None:
        """The next of `outputs`. None if there is none yet and we shall not wait.

        Raises EngineDeadError once the EngineFailure has been read.
        """
        while True:
            left = self._look_for_stall()
            told = self._told
            with suppress(queue.Empty):
                return self.outputs.get(wait and not told, left)
            if told:
                raise self._death()
            if not wait:
                return None

    def stats(self) -> EngineStats:
        """A snapshot; exact once the engine is idle."""
        active, since, now = self._active_seconds, self._active_since, time.perf_counter()
        if since is not None:
            active += now - since
        stats = replace(self._loop.scheduler.stats)
        return EngineStats(stats, self._loop.slots.busy_seconds, active, self._seconds_since_progress(now))

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

    def close(self, wait_seconds: float | None = None) -> None:
        """Stop after the step in hand; unfinished requests end with EngineDeadError. May be called again.

        Waits for the device no longer than stall_seconds, nor than wait_seconds, which is patience() if it is None.
        After that the engine's thread is left behind.
        """
        self._closing = True
        self._wake.set()
        if threading.current_thread() is self._thread:
            return
        until = time.perf_counter() + (patience() if wait_seconds is None else wait_seconds)
        while self._thread.is_alive() and not self._left_behind:
            stall, left = self._look_for_stall(), until - time.perf_counter()
            if left <= 0:
                self._leave_behind()
            elif self._ended.wait(left if stall is None else min(left, stall)):
                self._thread.join()  # not before: a join that Ctrl-C interrupts takes a thread that runs on for dead

    def _seconds_since_progress(self, now: float) -> float:
        since = self._active_since
        return 0.0 if since is None else now - max(since, self._progress_at)

    def _look_for_stall(self) -> float | None:
        """Give the engine up if it has stalled. Returns the seconds until that can be so next, None for never.

        In a process that was suspended, who waits may wake before the engine's thread can end its step. So the engine
        is given up only if it is found overdue twice, a grace apart, with no progress between.
        """
        if not self._stall_seconds or self._left_behind:
            return None
        now, since = time.perf_counter(), self._active_since
        if since is None:
            return self._stall_seconds
        mark = max(since, self._progress_at)
        left = mark + self._stall_seconds - now
        if left > 0:
            return left
        if self._overdue[0] != mark:
            self._overdue = (mark, now)
        left = self._overdue[1] + min(self._stall_seconds, GRACE_SECONDS) - now
        if left <= 0:
            error = TimeoutError(f"the device has made no progress for {self._stall_seconds:g} s (stall_seconds)")
            self._leave_behind(error)
        return max(left, 0.0)

    def _leave_behind(self, error: BaseException | None = None) -> None:
        """End the engine though its thread does not; should the device go on after all, the thread ends."""
        self._error = self._error or error
        self._closing = self._left_behind = True
        self._publish_failure()

    def _publish_failure(self) -> None:
        """Once, whoever calls."""
        if self._last_word.acquire(blocking=False):
            self.outputs.put(EngineFailure(self._death()))
            self._told = True

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
            self._error = self._error or error
        finally:
            try:
                self._loop.close()
            except BaseException as error:  # noqa: BLE001 - a device that failed often fails again when it is closed
                self._error = self._error or error
            finally:
                self._stop_clock()
                _drop_locals(self._error)
                atexit.unregister(self.close)
                self._publish_failure()
                self._ended.set()

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
        advice = f". {RUINED}" if ruins_process(self._error) else ""
        error = EngineDeadError(f"the engine failed: {type(self._error).__name__}: {self._error}{advice}")
        error.__cause__ = self._error
        return error


def patience() -> float:
    """Seconds that a close() waits for the device: few while an interrupt, an exit or a cancel is being handled."""
    return threading.TIMEOUT_MAX if isinstance(sys.exception(), Exception | None) else LEAVE_SECONDS


def _drop_locals(error: BaseException | None) -> None:
    """Empty the frames of an error and of what led to it: they hold the model, and callers hold the error."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        traceback.clear_frames(error.__traceback__)
        seen.append(error)
        error = error.__cause__ or error.__context__
