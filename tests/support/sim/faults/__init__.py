"""Planted faults, one of each kind, each a worse version of one component. The checks must find every one.

A fault stands for a bug that this kind of engine is known to ship: see docs/correctness.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from gapless.device.sim.streams import SimStream
from support.sim.faults import memory, streams, tokens
from support.sim.parts import Finding, Parts, Violation
from support.sim.rig import run
from support.sim.schedule import generate

MOST_SEEDS = 500


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done wrong, and the parts that do it."""

    name: str
    parts: Parts


FAULTS: tuple[Fault, ...] = (
    Fault("compute does not wait for h2d_done", streams.no_wait("compute", "h2d_done")),
    Fault("d2h does not wait for compute_done", streams.no_wait("d2h", "compute_done")),
    Fault("the host does not wait for d2h_done", streams.device(SimStream, streams.ImpatientHost)),
    Fault("h2d_done is not recorded", streams.no_record("h2d_done")),
    Fault("compute_done is not recorded", streams.no_record("compute_done")),
    Fault("d2h_done is not recorded", streams.no_record("d2h_done")),
    Fault("compute_begin is not recorded", streams.no_record("compute_begin")),
    Fault("compute waits for h2d_done before it is recorded", streams.device(streams.WaitFirst)),
    Fault("h2d_done is recorded before the copy", streams.record_before_work("h2d")),
    Fault("compute_done is recorded before the work", streams.record_before_work("compute")),
    Fault("d2h_done is recorded before the copy", streams.record_before_work("d2h")),
    Fault("compute waits for another slot's h2d_done", streams.device(streams.OtherSlotsEvent)),
    Fault("d2h waits for h2d_done in place of compute_done", streams.device(tokens.CopiesOutEarly)),
    Fault("a slot is refilled before its d2h_done", Parts(slots=memory.SlotTooEarly)),
    Fault("a slot is free at compute_done", Parts(slots=tokens.FreesSlotAtCompute)),
    Fault("a slot's pinned inputs are written after launch", Parts(runner=tokens.RefillsAfterLaunch)),
    Fault("slots share the pinned inputs", memory.shared("host_in")),
    Fault("slots share the device's inputs", memory.shared("device_in")),
    Fault("slots share the device's outputs", memory.shared("device_out")),
    Fault("slots share the pinned outputs", memory.shared("host_out")),
    Fault("collected tokens are a view of pinned memory", Parts(slots=memory.KeepsView)),
    Fault("a graph is captured with another slot's buffers", Parts(runner=tokens.OtherSlotsGraph)),
    Fault("table deltas are applied on the copy stream", Parts(runner=tokens.DeltasOnCopyStream)),
    Fault("work is queued that declares nothing", Parts(runner=tokens.UndeclaredDeltas)),
    Fault("a row and its blocks are freed at commit", Parts(scheduler=memory.FreesAtCommit)),
    Fault("a row's blocks are freed at commit", Parts(scheduler=memory.FreesBlocksAtCommit)),
    Fault("a step retires one step early", Parts(scheduler=memory.RetiresEarly)),
    Fault("cancel and retirement both free the blocks", Parts(scheduler=memory.FreesTwice)),
    Fault("a cancelled request also finishes", Parts(scheduler=memory.CancelAndFinish)),
    Fault("a cancelled request gets no end", Parts(scheduler=memory.SilentCancel)),
    Fault("a cancel with steps in flight is forgotten", Parts(scheduler=memory.ZombieCancel)),
    Fault("preemption loses tokens in flight", Parts(scheduler=memory.LosesTokens)),
    Fault("preemption repeats a token", Parts(scheduler=memory.RepeatsToken)),
    Fault("preemption keeps placeholders as tokens", Parts(scheduler=memory.KeepsPlaceholder)),
    Fault("the oldest sequence is preempted", Parts(scheduler=memory.PreemptsOldest)),
    Fault("a preempted sequence is forgotten", Parts(scheduler=memory.ForgetsPreempted)),
    Fault("a step that ran out of memory is committed", Parts(scheduler=memory.CommitsFailedStep)),
    Fault("sequences run on after a step without memory", Parts(scheduler=memory.RunsOnAfterFailure)),
    Fault("steps behind one without memory are committed", Parts(scheduler=memory.CommitsSkippedSteps)),
    Fault("the newest request is admitted first", Parts(scheduler=memory.NewestFirst)),
    Fault("overshoot tokens are emitted", Parts(scheduler=tokens.EmitsOvershoot)),
    Fault("overshoot tokens are billed", Parts(scheduler=tokens.BillsOvershoot)),
    Fault("an end by length overshoots", Parts(scheduler=tokens.RunsPastLimit)),
    Fault("a stop is reported as an end by length", Parts(scheduler=tokens.WrongReason)),
    Fault("a plan refers to live state", Parts(scheduler=tokens.LivePlan)),
    Fault("random numbers are keyed on the row", Parts(sampler=tokens.KeyedOnRow)),
    Fault("random numbers are keyed on the place in the batch", Parts(sampler=tokens.KeyedOnPlace)),
    Fault("random numbers are keyed on the step", Parts(sampler=tokens.KeyedOnStep)),
    Fault("random numbers are those of the position before", Parts(runner=tokens.WrongPosition)),
    Fault("a reused row keeps its first sampling parameters", Parts(runner=tokens.StaleParams)),
    Fault("a block table delta is lost", Parts(runner=tokens.LosesBlock)),
    Fault("there is no carry-over", Parts(runner=tokens.NoCarryOver)),
    Fault("the carry-over is from the step before", Parts(runner=tokens.CarriesOlderToken)),
    Fault("the carry-over goes by place in the batch", Parts(runner=tokens.CarriesNeighboursToken)),
    Fault("padding is written to a live row", Parts(runner=tokens.PadsOnRowZero)),
)


@dataclass(frozen=True, slots=True)
class Caught:
    """A fault and how it was found; `seeds` is None if it was not."""

    fault: Fault
    seeds: int | None
    violation: Violation | None

    @property
    def finding(self) -> Finding | None:
        return self.violation.finding if self.violation else None


def hunt(fault: Fault, most: int = MOST_SEEDS) -> Caught:
    """Run schedules from seed 0 until one finds the fault."""
    for seed in range(most):
        result = run(generate(seed), fault.parts)
        if result.violation is not None:
            return Caught(fault, seed + 1, result.violation)
    return Caught(fault, None, None)


def table() -> str:
    """Every fault and how it was found, as markdown."""
    lines = ["| planted fault | schedules until found | by | what was said |", "|---|---|---|---|"]
    for fault in FAULTS:
        caught = hunt(fault)
        said = caught.violation.text if caught.violation else ""
        lines.append(f"| {fault.name} | {caught.seeds or 'not found'} | {caught.finding} | {said} |")
    found = sum("| not found |" not in line for line in lines[2:])
    return "\n".join([*lines, "", f"{found} of {len(FAULTS)} found."])
