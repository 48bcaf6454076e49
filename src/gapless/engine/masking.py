"""Which tokens may come next, as bit masks in a slot's pinned buffer, made on a thread beside the engine's."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from gapless.engine.slots import Slot
from gapless.errors import InternalError
from gapless.plan import Ints
from gapless.request import ManyMasks, TokenMasks

NO_MASK = -1

Accepts = Sequence[tuple[TokenMasks, int]]
Fills = Sequence[tuple[TokenMasks, int]]


class Masking:
    """Fills the masks of one step at a time. The thread starts with the first work and ends with close()."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._work: Future[None] | None = None
        self._entries: Sequence[tuple[int, int, TokenMasks]] = ()
        self._numbers = 0

    def begin(
        self, accepted: Accepts, entries: Sequence[tuple[int, int, TokenMasks]], slot: Slot, samples: int
    ) -> None:
        """Tell the forms what was sampled, then fill a mask for each of these entries: see Scheduler.masks_of.

        Returns at once. samples: places of the step, padding included, see Slot.host_masks.
        """
        if self._work is not None:
            raise InternalError("the masks of a step are filled, and nobody has waited for them")
        words = slot.sizes.mask_words
        self._entries, self._numbers = entries, samples + len(entries) * words
        slot.masks[:samples] = NO_MASK
        for line, (place, _, _) in enumerate(entries):
            slot.masks[place] = line
        mask_MW = slot.masks[samples : self._numbers].reshape(len(entries), words)
        fills = [(masks, line) for line, (_, _, masks) in enumerate(entries)]
        self._work = self._submit(lambda: fill_masks(accepted, fills, mask_MW))

    def wait(self) -> tuple[int, list[tuple[int, str]]]:
        """Until all masks are filled. Returns how many numbers of the slot's masks are to be copied, and the requests
        whose form can not be followed any more, each with what is wrong. Raises what is nobody's fault but ours."""
        if self._work is None:
            raise InternalError("there are no masks to wait for")
        work, self._work = self._work, None
        work.result()
        failures = [(request_id, masks.error) for _, request_id, masks in self._entries if masks.error is not None]
        return self._numbers, failures

    def close(self) -> None:
        """End the thread. What it has in hand goes on, and is not looked at."""
        self._queue.put(None)

    def _submit(self, work: Callable[[], None]) -> Future[None]:
        if self._thread is None:  # a daemon: a caller's function that never returns must not hold the process
            self._thread = threading.Thread(target=self._run, name="gapless-masks", daemon=True)
            self._thread.start()
        done: Future[None] = Future()
        self._queue.put((done, work))
        return done

    def _run(self) -> None:
        while (queued := self._queue.get()) is not None:
            done, work = queued
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - wait() raises it; a panic of a library is no Exception
                done.set_exception(error)
            else:
                done.set_result(None)
            del queued, done, work


def fill_masks(accepted: Accepts, fills: Fills, mask_MW: Ints) -> None:
    """First the tokens, in their order, then the line of each. What has an error gets a line that allows nothing."""
    kinds = {type(masks) for masks, _ in (*accepted, *fills)}
    for kind in kinds:
        mine = [each for each in accepted if type(each[0]) is kind]
        lines = [each for each in fills if type(each[0]) is kind]
        if issubclass(kind, ManyMasks):
            kind.fill_many(mine, lines, mask_MW)
            continue
        for masks, token in mine:
            masks.accept(token)
        for masks, line in lines:
            masks.fill(mask_MW[line])
    for masks, line in fills:
        if masks.error is not None:
            mask_MW[line] = np.int32(0)
