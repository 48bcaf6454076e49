"""Faults of streams and events: waits and records that are dropped, early, late or of the wrong event."""

from __future__ import annotations

from collections.abc import Callable

from gapless.device.base import Event, Note
from gapless.device.faults import Faults
from gapless.device.sim import SimDevice
from gapless.device.sim.streams import Mark, SimEvent, SimStream, Wait
from support.sim.parts import Parts
from support.sim.rig_device import RigDevice


def no_wait(on: str, for_event: str) -> Parts:
    class Deaf(SimStream):
        def wait(self, event: Event) -> None:
            if not (self.name == on and isinstance(event, SimEvent) and event.name.startswith(for_event)):
                super().wait(event)

    return Parts(stream=Deaf)


def no_record(of_event: str) -> Parts:
    class Mute(SimStream):
        def record(self, event: Event) -> None:
            if not (isinstance(event, SimEvent) and event.name.startswith(of_event)):
                super().record(event)

    return Parts(stream=Mute)


class _LinkedEvent(SimEvent):
    """Knows its last record but one, and the event that the recording stream had waited for before."""

    former: Mark | None = None
    waited_for: Event | None = None


class _WaitsFirst(SimStream):
    def record(self, event: Event) -> None:
        assert isinstance(event, _LinkedEvent)
        event.former = event.mark
        super().record(event)

    def wait(self, event: Event) -> None:
        if isinstance(event, _LinkedEvent) and event.name.startswith("h2d_done"):
            self._device.host_acts()
            if event.former is not None:
                self.queue.append(Wait(event.former))
        else:
            super().wait(event)


WAIT_FIRST = Parts(stream=_WaitsFirst, event=_LinkedEvent)
"""The compute stream waits for h2d_done before that is recorded: as in CUDA, no wait or one for an older step."""


def record_before_work(name: str) -> Parts:
    """Of the work with this name, whichever stream it is on."""

    class Hasty(SimStream):
        held: tuple[Callable[[], None], Note | None] | None = None

        def enqueue(self, work: Callable[[], None], note: Note | None = None) -> None:
            if note is not None and note.step >= 0 and note.name == name:
                self.held = (work, note)
            else:
                super().enqueue(work, note)

        def record(self, event: Event) -> None:
            super().record(event)
            if self.held is not None:
                work, note = self.held
                self.held = None
                super().enqueue(work, note)

    return Parts(stream=Hasty)


class OtherSlotsEvent(SimStream):
    """Waits for the h2d_done of the slot that was filled before."""

    before: Event | None = None

    def wait(self, event: Event) -> None:
        if isinstance(event, SimEvent) and event.name.startswith("h2d_done"):
            event, self.before = self.before or event, event
        super().wait(event)


class ImpatientHost(SimEvent):
    def synchronize(self) -> None:
        if not self.name.startswith("d2h_done"):
            super().synchronize()


class _CopiesOutEarly(SimStream):
    waits_for: Event | None = None

    def record(self, event: Event) -> None:
        assert isinstance(event, _LinkedEvent)
        event.waited_for = self.waits_for
        super().record(event)

    def wait(self, event: Event) -> None:
        assert isinstance(event, _LinkedEvent)
        if event.name.startswith("compute_done") and event.waited_for is not None:
            super().wait(event.waited_for)
        else:
            self.waits_for = event
            super().wait(event)


COPIES_OUT_EARLY = Parts(stream=_CopiesOutEarly, event=_LinkedEvent)
"""The copy out waits for the inputs only."""


class _OfOneStep(Faults):
    """Forgets an error of an earlier step that no wait has told of since."""

    def __init__(self, device: RigDevice) -> None:
        super().__init__()
        self._device = device
        self._step = -1
        self._told: BaseException | None = None

    def inherit(self, error: BaseException | None) -> None:
        self._told = self._told or error

    def run(self, work: Callable[[], None]) -> None:
        step = self._device.step_in_hand
        self.error = self._told or (self.error if step == self._step else None)
        self._step, self._told = step, None
        super().run(work)


class RunsOnAfterFailure(SimStream):
    """Runs the steps behind one that ran out of memory, on tables that this one has not brought up to date."""

    def __init__(self, device: SimDevice, name: str, thread: int) -> None:
        super().__init__(device, name, thread)
        assert isinstance(device, RigDevice)
        self.faults = _OfOneStep(device)
