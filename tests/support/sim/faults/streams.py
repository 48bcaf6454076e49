"""Faults of streams and events: waits and records that are dropped, early, late or of the wrong event."""

from __future__ import annotations

from collections.abc import Callable

from gapless.device.base import Event, Note
from gapless.device.sim.streams import SimEvent, SimStream
from support.sim.parts import Parts


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


class WaitFirst(SimStream):
    """The compute stream waits for h2d_done before that is recorded: as in CUDA, no wait or one for an older step."""

    late: tuple[SimStream, Event] | None = None

    def record(self, event: Event) -> None:
        if isinstance(event, SimEvent) and event.name.startswith("h2d_done"):
            WaitFirst.late = (self, event)
        else:
            super().record(event)

    def wait(self, event: Event) -> None:
        super().wait(event)
        if WaitFirst.late is not None:
            stream, late = WaitFirst.late
            WaitFirst.late = None
            SimStream.record(stream, late)


def record_before_work(stream_name: str) -> Parts:
    class Hasty(SimStream):
        held: tuple[Callable[[], None], Note | None] | None = None

        def enqueue(self, work: Callable[[], None], note: Note | None = None) -> None:
            if self.name == stream_name and note is not None and note.step >= 0:
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


class CopiesOutEarly(SimStream):
    """The copy out waits for the inputs only."""

    inputs_there: Event | None = None

    def wait(self, event: Event) -> None:
        if isinstance(event, SimEvent) and event.name.startswith("h2d_done"):
            CopiesOutEarly.inputs_there = event
        elif CopiesOutEarly.inputs_there is not None:
            event = CopiesOutEarly.inputs_there
        super().wait(event)
