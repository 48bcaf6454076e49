"""Planted faults, one of each kind, each a worse version of one component. The checks must find every one.

A fault stands for a bug that this kind of engine is known to ship: see docs/correctness.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from support.sim.faults import (
    between,
    features,
    forks,
    inputs,
    masks,
    memory,
    progress,
    serving,
    sharing,
    streams,
    tokens,
)
from support.sim.findings import Violation
from support.sim.parts import Parts
from support.sim.rig import run
from support.sim.schedule import Schedule, commanded, crowd, generate, interrupted

MOST_SEEDS = 500


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done wrong, and the parts that do it.

    by         how a violation that proves it begins, any of them: a crash by the way does not count.
    graphs     None: as the schedules have it.
    schedules  where it is looked for.
    """

    name: str
    parts: Parts
    by: tuple[str, ...]
    graphs: bool | None = None
    schedules: Callable[[int], Schedule] = generate

    def schedule(self, seed: int) -> Schedule:
        """The one of this seed, as the fault is looked for in it."""
        schedule = self.schedules(seed)
        return schedule if self.graphs is None else replace(schedule, graphs=self.graphs)

    def proved_by(self, violation: Violation) -> bool:
        """Whether it is this fault that the violation tells of, and nothing that broke by the way."""
        return str(violation).startswith(self.by)


def _on(*buffers: str) -> tuple[str, ...]:
    """Found as a race on one of these."""
    return tuple(f"race: race on {each}" for each in buffers)


def _raising(*texts: str) -> tuple[str, ...]:
    """Found as an InternalError that begins so."""
    return tuple(f"books: InternalError: {each}" for each in texts)


HOST_IN, DEVICE_IN, DEVICE_OUT, HOST_OUT = map(_on, ("host in", "device in", "device out", "host out"))
HOST_MASKS, DEVICE_MASKS, HOST_LINES, DEVICE_LINES = map(
    _on, ("host masks", "device masks", "host lines", "device lines")
)
TABLE, BLOCK = _on("block table"), _on("keys", "values")
ROW_OR_BLOCK = (*BLOCK, *TABLE, *_on("last token"))
TOKENS = ("tokens",)
LOGPROBS = ("logprobs",)
TOLD = ("tokens: a form was told",)
FORGOTTEN = ("books: the features of rows",)
UNRUN = (*TOKENS, *LOGPROBS, "books: a step writes")
HELD = ("liveness: who waits",)
IN_FLIGHT = tuple(
    f"books: {what} with a step in flight"
    for what in ("something is done between steps", "the weights change", "memory is given back")
)
OWN_NUMBERS = ("books: 2 answers", "books: 4 answers")
WRITTEN = ("books: a step writes",)
WRONG_ROW = (*TOKENS, *BLOCK, *WRITTEN)
WRONG_PLACE = (*WRONG_ROW, "books: padding has")
TABLES = (*TABLE, *_on("temperature"))
COUNT = ("books: wrong count",)
ROW_BOOKS = _raising("row ")
SHARED = ("books: request",)  # a block that is not what it should be, or weights
TURN = ("liveness: request",)
LOST = (*TURN, *_raising("there is work"))
UNOWNED = _raising("of KV blocks")
LENT_TWICE = (*WRONG_ROW, *UNOWNED)
RECOMPUTED = ("books: recomputed",)
HIDDEN = (  # what the audit hides is no row, and no number of updates
    "error: IndexError: index 1515870810",
    "error: RuntimeError: shape '[3, 1515870810]'",
)
RUBBISH = (*TOKENS, "books: OutOfRangeError: replay")  # the poison is no token, and no row or block either


def _between(name: str, parts: Parts, *by: str) -> Fault:
    """Of the work between steps."""
    return Fault(name, parts, by, schedules=commanded)


FAILS_OPEN = Parts(masking=masks.OneMaskMissing, admission=masks.AsksForNoMask)

FAULTS: tuple[Fault, ...] = (
    Fault("compute does not wait for h2d_done", streams.no_wait("compute", "h2d_done"), DEVICE_IN),
    Fault("d2h does not wait for compute_done", streams.no_wait("d2h", "compute_done"), DEVICE_OUT),
    Fault("the host does not wait for d2h_done", Parts(event=streams.ImpatientHost), HOST_OUT),
    Fault("h2d_done is not recorded", streams.no_record("h2d_done"), DEVICE_IN),
    Fault("compute_done is not recorded", streams.no_record("compute_done"), DEVICE_OUT),
    Fault("d2h_done is not recorded", streams.no_record("d2h_done"), HOST_OUT),
    Fault("compute_begin is not recorded", streams.no_record("compute_begin"), _raising("seconds_since")),
    Fault("compute waits for h2d_done before it is recorded", streams.WAIT_FIRST, DEVICE_IN),
    Fault("h2d_done is recorded before the copy", streams.record_before_work("copy in"), DEVICE_IN),
    Fault("compute_done is recorded before the work", streams.record_before_work("sample"), DEVICE_OUT),
    Fault("d2h_done is recorded before the copy", streams.record_before_work("copy out"), HOST_OUT),
    Fault("masks_done is recorded before the copy", streams.record_before_work("copy masks"), DEVICE_MASKS),
    Fault("compute waits for another slot's h2d_done", Parts(stream=streams.OtherSlotsEvent), DEVICE_IN),
    Fault("d2h waits for h2d_done in place of compute_done", streams.COPIES_OUT_EARLY, DEVICE_OUT),
    Fault("a slot is refilled before its d2h_done", Parts(slots=memory.SlotTooEarly), HOST_IN),
    Fault("a slot is free at compute_done", Parts(slots=memory.FreesSlotAtCompute), HOST_OUT),
    Fault("a slot's pinned inputs are written after launch", Parts(runner=tokens.RefillsAfterLaunch), HOST_IN),
    Fault("slots share the pinned inputs", memory.shared("host_in"), HOST_IN),
    Fault("slots share the device's inputs", memory.shared("device_in"), DEVICE_IN),
    Fault("slots share the device's outputs", memory.shared("device_out"), DEVICE_OUT),
    Fault("slots share the pinned outputs", memory.shared("host_out"), HOST_OUT),
    Fault("collected tokens are a view of pinned memory", Parts(slots=memory.KeepsView), TOKENS),
    Fault("a graph is captured with another slot's buffers", Parts(runner=inputs.CapturedOnFirstSlot), _on("device")),
    Fault("another slot's graph is replayed", Parts(graphs=inputs.OtherSlotsGraph), _on("device")),
    Fault("another bucket's graph is replayed", Parts(graphs=inputs.OtherBucketsGraph), RUBBISH),
    Fault("table deltas are applied on the copy stream", tokens.DELTAS_ON_COPY_STREAM, TABLES, graphs=True),
    Fault("table deltas are applied on the copy stream, no graphs", tokens.DELTAS_ON_COPY_STREAM, TABLE, graphs=False),
    Fault("work is queued that declares nothing", Parts(runner=tokens.UndeclaredDeltas), ("books: work was queued",)),
    Fault("table deltas are declared as nothing", Parts(runner=tokens.DeltasDeclaredAsNothing), HIDDEN),
    Fault("table deltas are a part of the copy in", Parts(runner=tokens.DeltasInCopyIn), _raising("copy in")),
    Fault(
        "table deltas are written by the host", Parts(runner=tokens.DeltasByTheHost), ("books: block table changed",)
    ),
    Fault("KV blocks are zeroed by the host", Parts(pool=memory.ZeroesBlocksFromHost), ("books: keys 0 changed",)),
    Fault("a block table delta is lost", Parts(fill=inputs.loses_block), WRONG_ROW),
    Fault("a reused row keeps its first sampling parameters", Parts(runner=tokens.StaleParams), TOKENS),
    Fault("padding is written to a live row", Parts(fill=inputs.pads_on_row_zero), (*WRONG_ROW, *TABLE)),
    Fault("tokens are written to a neighbour's blocks", inputs.changed("token_rows_T", inputs.neighbours), WRONG_PLACE),
    Fault("the positions of a chunk are one too low", Parts(fill=inputs.chunks_too_early), TOKENS),
    Fault("a chunk samples from its first token", Parts(fill=inputs.samples_first_token), TOKENS),
    Fault("attention misses the last token of every sequence", inputs.changed("kv_len_E", inputs.one_less), TOKENS),
    Fault("attention reads one token of every sequence", inputs.changed("kv_len_E", inputs.ones), TOKENS),
    Fault("attention reads the block table of padding", Parts(fill=inputs.reads_scratch_row), TOKENS),
    Fault("attention reads a neighbour's block table", inputs.changed("rows_E", inputs.neighbours), WRONG_ROW),
    Fault("queries begin in the entry before", inputs.changed("query_start_E1", inputs.too_early), TOKENS),
    Fault("attention is told that there is nothing to do", inputs.told(inputs.nothing), TOKENS),
    Fault("attention is told of too short a cache", inputs.told(inputs.shorter_cache), TOKENS),
    Fault("attention is told of too few queries", inputs.told(inputs.shorter_queries), TOKENS),
    Fault("attention takes a chunk for a decode", Parts(runner=inputs.OneMoreDecode), TOKENS),
    Fault("chunks begin before the padding of decodes", Parts(fill=inputs.chunks_in_the_gap), TOKENS),
    Fault("decodes go on where others ran between", Parts(scheduler=inputs.GoesOnRegardless), WRONG_ROW),
    Fault("a step that goes on leaves its last block update behind", Parts(runner=inputs.SendsTooLittle), WRONG_ROW),
    Fault("the device counts no further", Parts(runner=inputs.CountsNoFurther), WRONG_ROW),
    Fault("the device counts on for padding", Parts(runner=inputs.CountsPadding), ("books: padding has",)),
    Fault(
        "decodes go on with the rows of the step before", Parts(runner=inputs.StaleRows), (*WRONG_ROW, *ROW_OR_BLOCK)
    ),
    Fault("a batch is taken for greedy", inputs.told(inputs.all_greedy), TOKENS),
    Fault("there is no carry-over", Parts(runner=tokens.NoCarryOver), TOKENS),
    Fault("the carry-over is from the step before", Parts(runner=tokens.CarriesOlderToken), TOKENS),
    Fault(
        "the carry-over goes by place in the batch",
        Parts(runner=tokens.CarriesNeighboursToken),
        (*TOKENS, *_raising("compute")),
    ),
    Fault("random numbers are keyed on the row", Parts(sampler=tokens.KeyedOnRow), TOKENS),
    Fault("random numbers are keyed on the place in the batch", Parts(sampler=tokens.KeyedOnPlace), TOKENS),
    Fault("random numbers are keyed on the step", Parts(sampler=tokens.KeyedOnStep), TOKENS),
    Fault("random numbers are those of the position before", tokens.EARLIER_POSITION, TOKENS),
    Fault("a row and its blocks are freed at commit", Parts(scheduler=memory.FreesAtCommit), ROW_OR_BLOCK),
    Fault("a row's blocks are freed at commit", Parts(scheduler=memory.FreesBlocksAtCommit), (*BLOCK, *UNOWNED)),
    Fault("a step retires one step early", Parts(scheduler=memory.RetiresEarly), ROW_OR_BLOCK),
    Fault("cancel and retirement both free the blocks", Parts(scheduler=memory.FreesTwice), BLOCK),
    Fault("a cancelled request also finishes", Parts(scheduler=memory.CancelAndFinish), COUNT),
    Fault("a cancelled request gets no end", Parts(scheduler=memory.SilentCancel), ("liveness: requests",)),
    Fault("a cancel with steps in flight is forgotten", Parts(scheduler=memory.ZombieCancel), COUNT),
    Fault("kept row sets go stale", Parts(scheduler=memory.KeepsRowSets), (*TOKENS, "books: rows")),
    Fault("preemption loses tokens in flight", Parts(scheduler=memory.LosesTokens), TOKENS),
    Fault("preemption repeats a token", Parts(scheduler=memory.RepeatsToken), TOKENS),
    Fault(
        "preemption keeps placeholders as tokens",
        Parts(scheduler=memory.KeepsPlaceholder),
        (*WRITTEN, *TOKENS, *SHARED),
    ),
    Fault("the oldest sequence is preempted", Parts(scheduler=memory.PreemptsOldest), ("liveness: the oldest",)),
    Fault("a preempted sequence is forgotten", Parts(scheduler=memory.ForgetsPreempted), ("liveness: request",)),
    Fault("a step that ran out of memory is committed", Parts(scheduler=memory.CommitsFailedStep), UNRUN),
    Fault(
        "sequences run on after a step without memory",
        Parts(scheduler=memory.RunsOnAfterFailure),
        (*ROW_BOOKS, *TOKENS),
    ),
    Fault(
        "steps behind one without memory are committed",
        Parts(scheduler=memory.CommitsSkippedSteps),
        UNRUN,
    ),
    Fault("steps behind one without memory run on", Parts(stream=streams.RunsOnAfterFailure), (*BLOCK, *WRITTEN)),
    Fault("the token budget does not shrink", Parts(scheduler=progress.NeverShrinks), ("liveness: the budget",)),
    Fault("the token budget does not grow back", Parts(scheduler=progress.StaysSmall), ("liveness: the budget",)),
    Fault("everybody but the oldest is preempted", Parts(scheduler=progress.PreemptsAll), ("liveness: request",)),
    Fault("who was preempted is preempted again", Parts(scheduler=progress.PreemptsAgain), ("liveness: not ended",)),
    Fault(
        "chunks go on only while nobody decodes",
        Parts(scheduler=progress.ChunksWaitForDecodes),
        ("liveness: the prompt",),
    ),
    Fault("rows wait for blocks that do not come", Parts(scheduler=progress.CountsFreedTwice), ("liveness: rows",)),
    Fault(
        "rows that sit out lose their budget",
        Parts(scheduler=progress.ChunksTakeAll),
        ("books: no budget is left",),
        schedules=crowd,
    ),
    Fault("tokens lost with a step are not counted", Parts(scheduler=progress.CountsNoFailedTokens), RECOMPUTED),
    Fault("the newest request is admitted first", Parts(scheduler=memory.NewestFirst), ("liveness: request",)),
    Fault("priorities are ignored", Parts(admission=sharing.NoPriorities), TURN),
    Fault("who is less urgent waits for ever", Parts(admission=sharing.StrictPriorities), TURN),
    Fault("who was preempted goes behind the others", Parts(scheduler=sharing.PreemptedGoBehind), TURN),
    Fault("blocks are found without their salt", Parts(admission=sharing.NoSalt), SHARED),
    Fault(
        "the digest of a prompt's block leaves out those before", Parts(admission=sharing.PromptDigestsAlone), SHARED
    ),
    Fault(
        "the digest of an answer's block leaves out those before", Parts(scheduler=sharing.AnswerDigestsAlone), SHARED
    ),
    Fault("a hit covers the last token, too", Parts(scheduler=sharing.CoversLastToken), SHARED),
    Fault("a shared block is freed with its first owner", Parts(pool=sharing.FreesWithFirstOwner), LENT_TWICE),
    Fault("an evicted block can still be found", Parts(pool=sharing.FindsEvicted), SHARED),
    Fault("idle blocks are evicted while they are shared", Parts(pool=sharing.EvictsShared), LENT_TWICE),
    Fault("chunks can be found when they are launched", Parts(scheduler=sharing.RegistersAtLaunch), WRITTEN),
    Fault("chunks of failed steps can be found", Parts(scheduler=sharing.RegistersFailedSteps), TOKENS),
    Fault("an answer's last token counts as computed", Parts(scheduler=sharing.RegistersLastToken), TOKENS),
    Fault("a row computes a shared block once more", Parts(rows=sharing.ComputesSharedBlock), WRITTEN),
    Fault("overshoot tokens are emitted", Parts(scheduler=tokens.EmitsOvershoot), TOKENS),
    Fault("overshoot tokens are billed", Parts(scheduler=tokens.BillsOvershoot), TOKENS),
    Fault("an end by length overshoots", Parts(scheduler=tokens.RunsPastLimit), ROW_BOOKS),
    Fault("a stop is reported as an end by length", Parts(scheduler=tokens.WrongReason), TOKENS),
    Fault("a plan refers to live state", Parts(scheduler=tokens.LivePlan), (*TOKENS, *ROW_BOOKS, *UNOWNED)),
    Fault("the newest step is collected first", Parts(loop=serving.CollectsNewest), _raising("step ")),
    Fault("one step more is started than there are slots", Parts(loop=serving.RunsTooFarAhead), _raising("slot A")),
    Fault("tokens are published before they are committed", Parts(scheduler=serving.PublishesBeforeCommit), TOKENS),
    Fault("ends are published before the last tokens", Parts(scheduler=serving.PublishesEndsFirst), TOKENS),
    Fault("max_tokens is exceeded by one", Parts(admission=serving.OneTokenMore), TOKENS),
    Fault("the context limit is missed by one", Parts(admission=serving.OneTokenLess), TOKENS),
    Fault("without max_tokens the last token is missing", Parts(admission=serving.StopsShortOfContext), TOKENS),
    Fault("a prompt of four tokens loses one", Parts(admission=serving.LosesOfFour), TOKENS),
    Fault("the request's seed is not used", Parts(admission=serving.OwnSeed), TOKENS),
    Fault("half of the seed's bits are lost", Parts(admission=serving.HalfSeed), TOKENS),
    Fault("ignore_eos is ignored", Parts(admission=serving.AlwaysStopsAtEos), TOKENS),
    Fault("end-of-sequence does not stop", Parts(admission=serving.NeverStopsAtEos), TOKENS),
    Fault("the prompt's first token is lost", Parts(admission=serving.LosesPrompt), TOKENS),
    Fault("compute does not wait for masks_done", streams.no_wait("compute", "masks_done"), DEVICE_MASKS),
    Fault("masks_done is not recorded", streams.no_record("masks_done"), DEVICE_MASKS),
    Fault("sample_begin is not recorded", streams.no_record("sample_begin"), _raising("seconds_since")),
    Fault("masks are copied before they are filled", Parts(masking=masks.CopiesBeforeFilled), HOST_MASKS),
    Fault("masks are filled before the steps in front are read", Parts(loop=masks.LeavesWaitingBehind), TOKENS),
    Fault("slots share the pinned lines", memory.shared("host_lines"), HOST_LINES),
    Fault("slots share the device's lines", memory.shared("device_lines"), DEVICE_LINES),
    Fault("a mask is that of another request", Parts(masking=masks.MasksOfOthers), TOKENS),
    Fault("masks go by place among the masked", Parts(masking=masks.MasksByPlace), TOKENS),
    Fault("a mask is that of the step before", Parts(masking=masks.MasksOfTheStepBefore), TOKENS),
    Fault("a missing mask allows everything", FAILS_OPEN, TOKENS),
    Fault("a mask is missing", Parts(masking=masks.OneMaskMissing), TOKENS),
    Fault("the end of the masks is not copied", Parts(masking=masks.CopiesTooFewMasks), TOKENS),
    Fault("who can not follow its form goes on", Parts(masking=masks.SwallowsFailures), TOKENS),
    Fault("a form is told of overshoot", Parts(scheduler=masks.AcceptsOvershoot), TOLD),
    Fault("preemption loses what a form has to be told", Parts(scheduler=masks.LosesAccepted), TOKENS),
    Fault("a form is told twice after preemption", Parts(scheduler=masks.AcceptsAgain), TOLD),
    Fault("a form begins again after preemption", Parts(scheduler=masks.BeginsFormAgain), TOKENS),
    Fault("n answers share the state of their form", Parts(scheduler=masks.OneFormForAll), TOKENS),
    Fault("a new row keeps the counts of the one before", Parts(runner=features.KeepsCounts), TOKENS),
    Fault("tokens count one step late", Parts(runner=features.CountsLate), TOKENS),
    Fault("tokens of a cache hit are not counted", Parts(scheduler=features.ForgetsSkipped), TOKENS),
    Fault("tokens of bad words are not counted with a cache hit", Parts(admission=features.ForgetsBadWords), TOKENS),
    Fault("a row gets the features of another", Parts(scheduler=features.LinesOfOthers), TOKENS),
    Fault("a row gets another's arguments of processors", Parts(scheduler=features.ArgumentsOfOthers), TOKENS),
    Fault(
        "a plain row keeps the features of the one before",
        Parts(scheduler=features.LeavesLines),
        (*TOKENS, *LOGPROBS, *FORGOTTEN),
    ),
    Fault(
        "a line that is lost with a step counts as sent",
        Parts(scheduler=features.LosesLinesOfFailedSteps),
        FORGOTTEN,
        schedules=interrupted,
    ),
    Fault("min_tokens is forgotten in preemption", Parts(scheduler=features.IgnoresMinTokens), TOKENS),
    Fault("log probabilities are those of another entry", Parts(scheduler=features.LogprobsOfOthers), LOGPROBS),
    Fault("log probabilities keep those of overshoot", Parts(scheduler=features.LogprobsWithOvershoot), LOGPROBS),
    Fault("log probabilities are read before d2h_done", Parts(slots=features.ReadsLinesEarly), HOST_LINES),
    Fault("collected log probabilities are a view of pinned memory", Parts(slots=features.KeepsViewOfLines), LOGPROBS),
    Fault("a preempted prompt is scored again", Parts(scheduler=features.ScoresAgain), LOGPROBS),
    Fault("a prompt is not scored where the cache has it", Parts(scheduler=features.SkipsScores), LOGPROBS),
    Fault("prompts are scored by the token behind", Parts(scheduler=features.ScoresOfTheNext), LOGPROBS),
    Fault("prompts are scored in the padding of decodes", Parts(fill=features.scores_in_the_gap), LOGPROBS),
    Fault("a follower shares the block that its leader writes to", Parts(scheduler=forks.SharesLastBlock), WRITTEN),
    Fault("a follower does not wait for its leader's prompt", Parts(scheduler=forks.FollowsAtOnce), SHARED),
    Fault("followers are never let go", Parts(scheduler=forks.NeverLetsGo), HELD),
    Fault("followers wait for their leader's end", Parts(scheduler=forks.LetsGoAtTheEnd), HELD),
    Fault("followers are lost with a cancelled leader", Parts(scheduler=forks.LosesFollowers), LOST),
    Fault("n answers draw the same random numbers", Parts(admission=forks.SameSeeds), OWN_NUMBERS),
    Fault("one of n answers is never begun", Parts(admission=forks.OneAnswerTooFew), OWN_NUMBERS),
    _between("a pause launches one more step", Parts(engine=between.PausesLate), "liveness: a step is launched"),
    _between("steps in flight are left unread in a pause", Parts(loop=between.DoesNotDrain), *IN_FLIGHT),
    _between("weights are written with a step in flight", Parts(loop=between.DrainsAllButOne), *IN_FLIGHT),
    _between("an update ends a pause", Parts(engine=between.GoesOnAfterUpdate), "books: the engine goes on"),
    _between("an engine that sleeps is updated", Parts(engine=between.UpdatesAsleep), "books: update ended"),
    _between("the prefix cache outlives an update", Parts(pool=between.KeepsPrefixCache), *SHARED),
    _between("who goes on keeps the KV of old weights", Parts(scheduler=between.KeepsKV), *TOKENS, *LOGPROBS),
    _between("who begins again keeps a token", Parts(scheduler=between.KeepsToken), *TOKENS),
    _between("who begins again is not told", Parts(engine=between.TellsNoRestart), *TOKENS),
    _between("the form of who begins again does not", Parts(scheduler=between.KeepsForm), *TOLD, *TOKENS),
    _between("the prompt of who begins again is not scored again", Parts(scheduler=between.KeepsScores), *LOGPROBS),
    _between("an update does not wait for those who have begun", Parts(engine=between.WaitsForNobody), *SHARED),
    _between("others begin while an update waits", Parts(scheduler=between.HoldsNobodyBack), *SHARED),
    _between("a follower is held back when its leader has begun", Parts(scheduler=between.LeavesFollowers), *SHARED),
    _between("a follower goes before its leader that is held back", Parts(scheduler=between.LetsFollowersGo), *SHARED),
    _between("who was held back is forgotten", Parts(scheduler=between.ForgetsHeldBack), *LOST),
    _between("KV is kept over a sleep", Parts(engine=between.KeepsKVAsleep), *TOKENS, *LOGPROBS),
    _between("weights are lost in a sleep", Parts(runner=between.LosesWeights), *TOKENS, *LOGPROBS),
)


@dataclass(frozen=True, slots=True)
class Caught:
    """A fault and the first violation that it led to, after so many schedules; None if there was none."""

    fault: Fault
    seeds: int | None
    violation: Violation | None

    @property
    def found(self) -> bool:
        """Whether the violation is one that proves the fault."""
        return self.violation is not None and self.fault.proved_by(self.violation)

    @property
    def line(self) -> str:
        """Of the table: name, count, check and what was said, without line numbers."""
        if self.violation is None or not self.found:
            return f"| {self.fault.name} | not found | | |"
        said = re.sub(r"(\.py):\d+", r"\1", self.violation.text)
        return f"| {self.fault.name} | {self.seeds} | {self.violation.finding} | {said} |"

    @property
    def schedule(self) -> Schedule:
        """In which it was found."""
        assert self.seeds is not None
        return self.fault.schedule(self.seeds - 1)


def hunt(fault: Fault) -> Caught:
    """Run schedules until one fails."""
    for seed in range(MOST_SEEDS):
        result = run(fault.schedule(seed), fault.parts)
        if result.violation is not None:
            return Caught(fault, seed + 1, result.violation)
    return Caught(fault, None, None)


def table() -> str:
    """Every fault and how it was found, as markdown."""
    hunts = [hunt(fault) for fault in FAULTS]
    head = ["| planted fault | schedules until found | by | what was said |", "|---|---|---|---|"]
    found = f"{sum(caught.found for caught in hunts)} of {len(FAULTS)} found."
    return "\n".join([*head, *(caught.line for caught in hunts), "", found])
