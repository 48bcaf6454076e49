"""The engine as the rig has it: the real one's turns on the rig's thread, and nobody waits for what is done between."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gapless.engine.admission import Admission
from gapless.engine.core import Engine, InFlight
from gapless.engine.core import _Command as Command  # pyright: ignore[reportPrivateUsage]
from gapless.engine.loop import Loop
from gapless.errors import ConfigError
from support.sim.findings import Broken

if TYPE_CHECKING:
    from support.sim.rig import Rig
    from support.sim.schedule import Move


@dataclass(frozen=True, slots=True)
class Asked:
    """What a move asked for."""

    move: Move
    command: Command


class RigEngine(Engine):
    """Watches that what is asked for is done in order, with nothing in flight, and lets nothing run in a pause.

    done  what was done, by kind
    """

    def __init__(self, loop: Loop, admission: Admission, rig: Rig) -> None:
        self.rig = rig
        self.done: Counter[str] = Counter()
        self._asked: deque[Asked] = deque()
        self._pauses = self._sleeps = False  # as it must be, by what was done
        self._updates = 0
        self._stepped = False
        super().__init__(loop, admission)
        self._thread.join()

    def _run(self) -> None:
        """The engine's thread has nothing to do: see run_here()."""

    def run_here(self) -> None:
        """All turns of the engine. Raises what ends it."""
        super()._run()
        if self._error is not None:
            raise self._error

    def ring(self) -> None:
        """Something came in."""
        self._wake.set()

    @property
    def holds_back(self) -> bool:
        """Whether requests must end before something is done, and so none may begin."""
        return self._ending

    # ------------------------------------------------------------- commands

    def ask(self, move: Move) -> None:
        """For what this move says."""
        self._move = move
        if move.kind != "update":
            getattr(self, move.kind)()
            return
        self._updates += 1
        try:
            self.update_weights({"key": torch.tensor([self._updates])}, in_flight=move.in_flight)
        except ConfigError:
            if not self._sleeps:
                raise

    def between_steps(
        self,
        work: Callable[[Loop], None],
        *,
        in_flight: InFlight | None = None,
        pauses: bool | None = None,
        asleep: bool = False,
    ) -> None:
        command = Command(work, in_flight, pauses, asleep, Future())
        self._asked.append(Asked(self._move, command))
        self._inbox.put(command)
        self.ring()

    @property
    def in_hand(self) -> Move:
        """What is being done."""
        return next(asked.move for asked in self._asked if not asked.command.done.done())

    # ---------------------------------------------------------------- turns

    def _wait_for_work(self) -> None:
        self._stepped = False
        if not self._wake.is_set():
            self.rig.go_on(paused=self._paused)

    def _intake(self) -> None:
        stepped, self._stepped = self._stepped, True
        if stepped:
            self.rig.boundary("between steps")
        self.ring()
        super()._intake()
        if stepped:
            self.rig.check_step()

    def _obey(self) -> None:
        super()._obey()
        self._check_done()

    def _check_done(self) -> None:
        """What was done was done in order, and what it says of pause and sleep is so."""
        if not self._asked or not self._asked[0].command.done.done():
            return
        self.rig.check_idle("something is done between steps")
        while self._asked and self._asked[0].command.done.done():
            asked = self._asked.popleft()
            kind, command = asked.move.kind, asked.command
            refused = self._sleeps and kind in ("resume", "update")
            if (command.done.exception() is not None) != refused:
                raise Broken("books", f"{kind} ended with {command.done.exception()!r}")
            if not refused:
                self.done[kind] += 1
                self._pauses = self._pauses if command.pauses is None else command.pauses
                self._sleeps = kind == "sleep" or (self._sleeps and kind != "wake")
        if self._loop.runner.asleep != self._sleeps:
            raise Broken("books", f"the engine is {'awake' if self._sleeps else 'asleep'}")
        if not self._ending and self._paused != self._pauses:
            raise Broken("books", f"the engine {'goes on' if self._pauses else 'pauses'}")
        self._loop.check_integrity()

    def check_launch(self) -> None:
        """Only what must end before something is done may run in a pause."""
        if self._pauses and not self._ending:
            raise Broken("liveness", "a step is launched in a pause")

    def check_end(self) -> None:
        """All was done."""
        if self._asked:
            raise Broken("liveness", f"{self._asked[0].move.kind} was never done")
