"""The engine: the loop on a thread of its own, an inbox in front of it and a queue of what became known behind it."""

from __future__ import annotations

import atexit
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from gapless.device.faults import ruins_process
from gapless.engine.admission import Admission
from gapless.engine.loop import Loop
from gapless.errors import ConfigError, EngineDeadError, GaplessError, OutOfMemoryError
from gapless.outcome import Committed
from gapless.request import Request
from gapless.scheduler import Scheduler, SchedulerStats

RUINED = "The GPU can not be used by this process any more: start the process again"
GRACE_SECONDS = 5.0  # at most, from the first overdue look at a stall to the engine's death
COMMAND_POLL_SECONDS = 1.0  # who waits for a command looks so often whether the engine lives
_ASLEEP = "the engine sleeps: call wake() first"
LEAVE_SECONDS = 5.0  # that close() waits for the device when the process ends or is interrupted


@dataclass(frozen=True, slots=True)
class EngineFailure:
    """The last thing an engine publishes when it dies. `error` is what every unfinished request ends with."""

    error: EngineDeadError


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts and times since the start of the engine.

    lookahead               steps launched before the oldest is read
    running, waiting        requests that hold a row, and those that wait for one
    blocks_used             KV blocks that requests hold; what is only kept for the prefix cache is not counted
    busy_seconds            time that the compute stream spent in compute stages, by device events
    active_seconds          wall time during which there was work
    wait_seconds            of it, that the host waited for the device: the rest is the host's own work
    seconds_since_progress  wall time since the last step ended or work came, 0.0 without work. More than a step can
                            take means that the engine is stalled; EngineConfig.stall_seconds gives it up
    """

    scheduler: SchedulerStats
    lookahead: int
    running: int
    waiting: int
    blocks_used: int
    busy_seconds: float
    active_seconds: float
    wait_seconds: float
    seconds_since_progress: float

    @property
    def busy_share(self) -> float:
        """Part of the active wall time that the compute stream was computing, 0 to 1."""
        return self.busy_seconds / self.active_seconds if self.active_seconds else 0.0


InFlight = Literal["finish", "continue", "restart"]
"""What becomes of requests that have begun when the model changes: they end first; or what they have is computed again
with the new one, and they go on; or they begin again, without the tokens they have."""


@dataclass(frozen=True, slots=True, eq=False)
class _Command:
    """Work for the engine's thread between two steps, with nothing in flight."""

    work: Callable[[Loop], None]
    in_flight: InFlight | None  # None: rows stay as they are
    pauses: bool | None  # None: as it was
    asleep: bool  # may be done while the engine sleeps
    done: Future[None]


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
        self._inbox: queue.SimpleQueue[Request | int | _Command] = queue.SimpleQueue()  # an int: a request to cancel
        self._commands: deque[_Command] = deque()  # taken out of the inbox, not done yet
        self._paused = False
        self._ending = False  # what has begun is to end before the next command
        self._was_paused = False  # when that began
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
        scheduler, slots = self._loop.scheduler, self._loop.slots
        running, waiting = scheduler.census()
        return EngineStats(
            scheduler=replace(scheduler.stats),
            lookahead=self._loop.lookahead,
            running=running,
            waiting=waiting,
            blocks_used=scheduler.pool.num_usable - scheduler.pool.num_free,
            busy_seconds=slots.busy_seconds,
            active_seconds=active,
            wait_seconds=slots.wait_seconds,
            seconds_since_progress=self._seconds_since_progress(now),
        )

    def pause(self) -> None:
        """Stop after the steps in flight. Requests keep what they have, and new ones wait, until resume().

        Returns once nothing runs. Raises EngineDeadError.
        """
        self.between_steps(lambda _: None, pauses=True, asleep=True)

    def resume(self) -> None:
        """Go on after pause(). Raises ConfigError while the engine sleeps; EngineDeadError."""
        self.between_steps(lambda _: None, pauses=False)

    def sleep(self) -> None:
        """Pause, and give back the memory of weights, KV cache and graphs; on the CPU only pause. The weights are kept
        on the host, and requests that have begun are computed again after wake(). Raises EngineDeadError."""
        self.between_steps(lambda loop: loop.runner.sleep(), in_flight="continue", pauses=True, asleep=True)

    def wake(self) -> None:
        """Undo sleep(), and go on. Raises EngineDeadError; OutOfMemoryError if the memory is not free any more: the
        engine sleeps on then."""
        self.between_steps(lambda loop: loop.runner.wake(), pauses=False, asleep=True)

    def update_weights(self, tensors: Mapping[str, Tensor], *, in_flight: InFlight = "finish") -> None:
        """Put new values into the model's weights, in place, between two steps. The prefix cache is emptied.

        tensors    by their Hugging Face names, all or some; on any device, in any float type.
        in_flight  what becomes of requests that have begun.

        Raises CorruptModelError for a name or a shape that the model does not have, with nothing changed;
        ConfigError while the engine sleeps; EngineDeadError.
        """

        def work(loop: Loop) -> None:
            try:
                loop.runner.update_weights(tensors)
            except OutOfMemoryError as error:
                raise RuntimeError("no memory for an update: some weights are new and some old") from error

        if self._loop.runner.asleep:  # there is nothing to check them against
            raise ConfigError(_ASLEEP)
        self._loop.runner.model.check_weights(tensors)  # before anything is recomputed
        self.between_steps(work, in_flight=in_flight)

    @property
    def paused(self) -> bool:
        return self._paused

    def between_steps(
        self,
        work: Callable[[Loop], None],
        *,
        in_flight: InFlight | None = None,
        pauses: bool | None = None,
        asleep: bool = False,
    ) -> None:
        """Run `work` on the engine's thread between two steps, with nothing in flight, and wait for it.

        in_flight  what becomes of the requests that have begun; None: nothing, they keep what they have.
        pauses     True, False: pause or go on afterwards; None: as it was. To let requests end, a paused engine runs.
        asleep     whether it may be done while the engine sleeps.

        Raises ConfigError, EngineDeadError, and what `work` raises; the engine goes on if that is a GaplessError.
        """
        if in_flight not in (None, "finish", "continue", "restart"):
            raise ConfigError(f"in_flight must be finish, continue or restart, not {in_flight!r}")
        self.check_alive()
        command = _Command(work, in_flight, pauses, asleep, Future())
        self._inbox.put(command)
        self._wake.set()
        while True:
            left = self._look_for_stall()
            try:
                return command.done.result(COMMAND_POLL_SECONDS if left is None else min(left, COMMAND_POLL_SECONDS))
            except FutureTimeoutError:
                if command.done.done():
                    raise  # of the work itself
                if not self._thread.is_alive() or self._left_behind:
                    raise self._death() from None

    def set_lookahead(self, lookahead: int) -> None:
        """Run with fewer steps in flight than the engine was built for, or with all again, from the next step on.

        Lets both sides of a comparison use the same slots, graphs and memory. Raises ConfigError, EngineDeadError.
        """
        if not 0 <= lookahead < len(self._loop.slots.slots):
            raise ConfigError(f"lookahead must be 0 to {len(self._loop.slots.slots) - 1} here, not {lookahead}")

        def work(loop: Loop) -> None:
            loop.lookahead = lookahead

        self.between_steps(work, asleep=True)

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
                self._obey()
                while self._loop.has_work and not self._closing and not self._paused:
                    self._loop.step()
                    self._progress_at = time.perf_counter()
                    self._intake()
                    self._obey()
        except BaseException as error:  # noqa: BLE001 - reported to every waiting request
            self._error = self._error or error
        finally:
            try:
                self._loop.close()
            except BaseException as error:  # noqa: BLE001 - a device that failed often fails again when it is closed
                self._error = self._error or error
            finally:
                self._stop_clock()
                self._refuse_commands()
                _drop_locals(self._error)
                atexit.unregister(self.close)
                self._publish_failure()
                self._ended.set()

    def _wait_for_work(self) -> None:
        """Sleep until there is something in the inbox. The only place where an idle engine waits."""
        self._stop_clock()
        self._wake.wait()  # a pause is ended by a command, too
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
            elif isinstance(command, _Command):
                self._commands.append(command)
            else:
                scheduler.cancel(command)
        if finished := scheduler.take_finished():
            self.outputs.put(Committed.without_tokens(finished))

    def _obey(self) -> None:
        """Do what was asked for between two steps, as soon as that can be."""
        scheduler = self._loop.scheduler
        while self._commands:
            command, asleep = self._commands[0], self._loop.runner.asleep
            if command.in_flight == "finish" and not asleep and self._ends_first(scheduler):
                return
            self._commands.popleft()
            self._loop.drain()
            restarted: tuple[int, ...] = ()
            try:
                if asleep and not command.asleep:
                    raise ConfigError(_ASLEEP)
                if command.in_flight is not None:
                    restarted = scheduler.recompute_all(restart=command.in_flight == "restart")
                command.work(self._loop)
            except GaplessError as error:
                command.done.set_exception(error)
            except BaseException as error:
                command.done.set_exception(error)
                raise
            else:
                if command.pauses is not None:
                    self._paused = command.pauses
                command.done.set_result(None)
            if self._ending:
                scheduler.let_begin()
                self._ending = False
                self._paused |= self._was_paused and command.pauses is not False
            finished = scheduler.take_finished()
            if restarted or finished:
                self.outputs.put(replace(Committed.without_tokens(finished), restarted=restarted))

    def _ends_first(self, scheduler: Scheduler) -> bool:
        """Whether requests that must end first still run. They do so though the engine is paused."""
        if not self._ending:
            scheduler.hold_back()
            self._ending, self._was_paused = True, self._paused
        self._paused = self._was_paused and not scheduler.any_begun
        return scheduler.any_begun

    def _refuse_commands(self) -> None:
        """Nobody will do them."""
        with suppress(queue.Empty):
            while True:
                if isinstance(command := self._inbox.get_nowait(), _Command):
                    self._commands.append(command)
        for command in self._commands:
            command.done.set_exception(self._death())

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
