"""Runs a schedule on the simulated device and says what went wrong, if anything did."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from gapless.budget import FIRST_PATIENCE
from gapless.device.sim import Race, RandomOrder
from gapless.device.sim.streams import UNDECLARED
from gapless.engine.admission import ModelFacts
from gapless.engine.build import capturer, slot_capacity
from gapless.engine.slots import Slot
from gapless.engine.tables import DeviceTables
from gapless.errors import InternalError
from gapless.outcome import Committed, Finished
from gapless.plan import Plan
from gapless.request import FinishReason, Request
from gapless.rows import RowState
from support.sim.findings import Broken, Violation
from support.sim.model import stops_of
from support.sim.owners import Owners, Shared
from support.sim.parts import Parts, RigDevice, RigSampler
from support.sim.schedule import Move, Schedule, Shortage


@dataclass
class Result:
    """Of one run."""

    steps: int
    violation: Violation | None
    device: RigDevice
    requests: list[Request] = field(default_factory=list[Request])
    tokens: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    finished: dict[int, Finished] = field(default_factory=dict[int, Finished])
    preemptions: int = 0
    exhausted: int = 0  # preemptions that nobody asked for: the blocks ran out
    overshoot: int = 0
    failed_steps: int = 0
    most_placeholders: int = 0
    shared: list[Shared] = field(default_factory=list[Shared])


class Rig:
    """One engine on the simulated device, with the schedule's moves at its phase boundaries."""

    def __init__(self, schedule: Schedule, parts: Parts | None = None) -> None:
        self.schedule = schedule
        self.parts = parts = parts or Parts()
        order = RandomOrder(schedule.order_seed, schedule.eagerness)
        audit = parts.audit or schedule.audit
        self.device = device = parts.device(order, parts, captures_graphs=schedule.graphs, audit=audit)
        self.requests: list[Request] = []  # their ids count all arrivals, from 0
        self.owners = Owners(schedule.limits, parts.expected)
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, Finished] = {}
        self.ended: set[int] = set()  # requests whose end the engine has told, read or not
        self.cancelled: set[int] = set()  # before their end was told
        self.steps = 0
        self._shortage: list[Shortage] = []
        self._moves = deque(schedule.moves)
        self._points = self._arrivals = 0
        self._unread: deque[Committed] = deque()
        limits = schedule.limits
        model, cpu = parts.model(), torch.device("cpu")
        self.admission = parts.admission(limits, ModelFacts(model.vocab_size, model.eos_token_ids), 7)
        self.kv = model.kv_spec.allocate(limits.num_blocks, limits.block_size, torch.float32, cpu)
        self._tables = DeviceTables.allocate(limits.max_rows + 1, limits.block_columns, cpu)
        graphs = parts.graphs(schedule.buckets, schedule.mixed)
        sampler = RigSampler(parts.sampler(), device)
        runner = parts.runner(model, device, sampler, self.kv, self._tables, graphs)
        capacity = slot_capacity(graphs, limits)
        slots = parts.slots(device, schedule.lookahead + 1, capacity, limits.max_rows)
        runner.rig = slots.rig = self
        if schedule.graphs:
            graphs.capture(slots.slots, capturer(runner, limits))
        self.scheduler = parts.scheduler(limits, self)
        device.pool = self.scheduler.pool
        device.run_now(lambda: None, runner.compute)
        self.loop = parts.loop(self.scheduler, slots, runner, self._publish, schedule.lookahead)
        device.watch(self._device_memory())
        for name, table in self._tables.decodes.by_name():
            device.poison(table, name)
        for slot in slots.slots:
            self.poison_slot(slot)
        for row in range(limits.max_rows):
            self.poison_row(row)
        self.poison_blocks(np.arange(1, limits.num_blocks))

    def _device_memory(self) -> dict[str, torch.Tensor]:
        """Tables, KV cache and slots, by name."""
        memory = {"block table": self._tables.block_table_RC, "last token": self._tables.last_token_R}
        memory |= self._tables.sampling.by_name()
        memory |= self._tables.decodes.by_name()
        for layer, cache in enumerate(self.kv):
            memory |= {f"keys {layer}": cache.k_BKSD, f"values {layer}": cache.v_BKSD}
        for slot in self.loop.slots.slots:
            memory |= {f"device in {slot.letter}": slot.device_in, f"device out {slot.letter}": slot.device_out}
        return memory

    # ------------------------------------------------------------- the run

    def run(self) -> Result:
        """To the end, or to the first violation."""
        violation = None
        try:
            self._run()
        except Broken as broken:
            violation = broken.violation
        except Exception as error:  # noqa: BLE001 - whatever it is, the schedule has found it
            violation = Violation("books" if isinstance(error, InternalError) else "error", _describe(error))
        if violation is not None:
            with suppress(Exception):
                self.device.close()  # what is still queued may be the other half of a race
        if self.device.checker.races:  # what else broke is a consequence
            violation = Violation("race", str(min(self.device.checker.races, key=_with_poison)))
        stats = self.scheduler.stats
        return Result(
            self.steps,
            violation,
            self.device,
            self.requests,
            self.tokens,
            self.finished,
            stats.preemptions,
            stats.preemptions - self._asked,
            stats.overshoot_rows,
            stats.failed_steps,
            self._most_placeholders,
            self.owners.shared,
        )

    def _run(self) -> None:
        while self._moves or self.loop.has_work:
            if not self.loop.has_work:
                self._points = max(self._points, self._moves[0].point)
                self._act()
                self._publish_ends()
            else:
                self._step()
        self._read(0)
        self._check_end()

    def _step(self) -> None:
        self.loop.step()
        self.boundary("between steps")
        self._publish_ends()
        self.steps += 1
        if self.device.checker.races:
            raise Broken("race", str(self.device.checker.races[0]))
        if self.steps > self.schedule.most_steps:
            unended = len(self.requests) - len(self.finished)
            raise Broken("liveness", f"not ended after {self.steps} steps: {unended} requests")
        self.loop.check_integrity()
        self._recount()
        self._read(self.schedule.reader_lag)

    def boundary(self, name: str, step: int = -1, slot: str = "") -> None:
        """A phase boundary: what the schedule has for this point happens now."""
        self.device.moment(name, step, slot)
        self._points += 1
        self._act()

    _asked = 0  # preemptions by moves
    _failed = 0  # steps that ran out of memory
    _most_placeholders = 0  # of one sequence

    def count_failure(self) -> None:
        """A step has run out of memory."""
        self._failed += 1

    def take_memory(self, plan: Plan) -> None:
        """The step is about to be launched: whether it runs out of memory, and where."""
        if self._shortage:
            self.device.shortages[plan.step] = self._shortage.pop()

    def _act(self) -> None:
        while self._moves and self._moves[0].point <= self._points:
            move = self._moves.popleft()
            if move.kind == "add":
                self._add(move)
            elif move.kind == "exhaust":
                self._shortage.append(move.where)
                self.device.moment(f"memory is short {move.where}")
            elif move.target < len(self.requests):
                request_id = self.requests[move.target].request_id
                if move.kind == "cancel":
                    if request_id not in self.ended:
                        self.cancelled.add(request_id)
                    self.scheduler.cancel(request_id)
                else:
                    self._preempt(request_id)
                self.device.moment(f"{move.kind} request {request_id}")

    def _preempt(self, request_id: int) -> None:
        if self.scheduler.preempt(request_id):
            self._asked += 1
            table = self.scheduler.rows
            if (table.state[table.request_id == request_id] != RowState.PREEMPTED).any():
                raise Broken("books", f"request {request_id} runs on after its preemption")

    def _add(self, move: Move) -> None:
        for _ in range(move.arrivals):
            next(self.admission._ids)  # pyright: ignore[reportPrivateUsage]
        self._arrivals += move.arrivals
        request = self.admission.make_request(move.prompt, move.params, priority=move.priority, cache_salt=move.salt)
        if request.request_id != self._arrivals:
            raise Broken("books", f"request {self._arrivals} got the id {request.request_id}")
        self._arrivals += 1
        self.requests.append(request)
        self.owners.add(request.request_id, move)
        self.tokens[request.request_id] = []
        self.scheduler.add(request)
        self.device.moment(f"add request {request.request_id}")

    # ---------------------------------------------------------- the consumer

    def _publish(self, committed: Committed) -> None:
        self._unread.append(committed)
        self.boundary("published")

    def _publish_ends(self) -> None:
        """Cancelled requests are reported between steps, as the engine's intake does."""
        if finished := self.scheduler.take_finished():
            self._unread.append(Committed(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32), finished))

    def _read(self, leave: int) -> None:
        """The consumer, who may be late."""
        while len(self._unread) > leave:
            record = self._unread.popleft()
            for request_id, token in zip(record.request_ids.tolist(), record.tokens.tolist(), strict=True):
                if request_id in self.finished:
                    raise Broken("tokens", f"request {request_id} got token {token} after its end")
                if request_id not in self.tokens:
                    raise Broken("tokens", f"token {token} for request {request_id}, which nobody made")
                self.tokens[request_id].append(token)
            for end in record.finished:
                if end.request_id in self.finished:
                    raise Broken("tokens", f"request {end.request_id} ended twice")
                self.finished[end.request_id] = end
                self._check_request(end)

    # ------------------------------------------------------------ the checks

    def _recount(self) -> None:
        """Placeholders and the numbers that the scheduler gives of itself."""
        table, scheduler = self.scheduler.rows, self.scheduler
        unknown = table.length - table.known
        if unknown.min() < 0 or unknown.max() > self.schedule.lookahead + 1:
            raise Broken("books", f"placeholders by row: {unknown.tolist()}")
        self._most_placeholders = max(self._most_placeholders, int(unknown.max()))
        running = int(((table.state != RowState.FREE) & (table.state != RowState.DEAD)).sum())
        open_requests = len(self.requests) - len(self.ended | self.cancelled)
        if (scheduler.num_running, scheduler.num_waiting) != (running, open_requests - running):
            raise Broken("books", f"wrong count: {scheduler.num_running} running, {scheduler.num_waiting} waiting")

    def _check_request(self, end: Finished) -> None:
        """The oracle: exactly what it gets alone, or a beginning of that if it was cancelled."""
        got, move, name = self.tokens[end.request_id], self.owners.moves[end.request_id], f"request {end.request_id}"
        want = self.parts.expected(move, self.schedule.limits) if self.parts.expected else got
        if end.generated != len(got):
            raise Broken("tokens", f"{name} has {len(got)} tokens and a usage of {end.generated}")
        if (end.reason is FinishReason.CANCELLED) != (end.request_id in self.cancelled):
            raise Broken("tokens", f"{name} ended by {end.reason.value}, wrongly: was it cancelled?")
        if end.reason is FinishReason.CANCELLED:
            want = want[: len(got)]
        elif not want or (end.reason is FinishReason.STOP) != (want[-1] in stops_of(move.params)):
            raise Broken("tokens", f"{name} ended by {end.reason.value}, alone it ends with {want[-1:]}")
        if got != want:
            at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
            raise Broken("tokens", f"{name} differs at token {at}: {got[at : at + 3]} in place of {want[at : at + 3]}")
        if end.cached != (cached := self.owners.begins.get(end.request_id, 0)):
            raise Broken("books", f"{name} began at token {cached}, and {end.cached} are said to be cached")

    def _check_end(self) -> None:
        """Everything is back where it was."""
        if missing := [each.request_id for each in self.requests if each.request_id not in self.finished]:
            raise Broken("liveness", f"requests {missing} never got their end")
        scheduler, table = self.scheduler, self.scheduler.rows
        self.loop.check_integrity()
        if scheduler.pool.num_free != scheduler.pool.num_usable:
            raise Broken("books", "KV blocks are still held")
        if scheduler.num_running or scheduler.num_waiting or (table.state != RowState.FREE).any():
            raise Broken("books", "rows are still held")
        if (table.length != table.known).any():
            raise Broken("books", "placeholders are left")
        if any(slot.in_flight for slot in self.loop.slots.slots):
            raise Broken("books", "a slot is still lent")
        if not self.device.idle:
            raise Broken("books", "work is still queued on the device")
        self.device.check_watched()
        self._check_budget()
        if any(span.name == UNDECLARED for span in self.device.timeline.spans):
            raise Broken("books", "work was queued that does not declare what it touches")
        stats = scheduler.stats
        if stats.generated_tokens != sum(map(len, self.tokens.values())):
            raise Broken("books", f"{stats.generated_tokens} generated tokens were counted")
        prompts = {request_id: len(move.prompt) for request_id, move in self.owners.moves.items()}
        never_ran = sum(size for request_id, size in prompts.items() if not self.tokens[request_id])
        if not sum(prompts.values()) - never_ran <= stats.prompt_tokens <= sum(prompts.values()):
            raise Broken("books", f"{stats.prompt_tokens} prompt tokens were counted")
        if stats.cached_tokens != sum(self.owners.begins.values()):
            raise Broken("books", f"{stats.cached_tokens} cached tokens were counted")
        if stats.failed_steps != self._failed or stats.preemptions < self._asked:
            raise Broken("books", f"{stats.failed_steps} failed steps and {stats.preemptions} preemptions were counted")
        if stats.recomputed_tokens != scheduler.fed_again:
            raise Broken("books", f"recomputed: {scheduler.fed_again} tokens, counted: {stats.recomputed_tokens}")
        ends = [self.finished[each.request_id].reason for each in self.requests]
        ahead = self.schedule.lookahead
        allowed = ends.count(FinishReason.STOP) * ahead + ends.count(FinishReason.CANCELLED) * (ahead + 1)
        if scheduler.stats.overshoot_rows > allowed:
            raise Broken("tokens", f"{scheduler.stats.overshoot_rows} overshoot rows, at most {allowed} can be")

    def _check_budget(self) -> None:
        """Good steps bring all of it back. Each failure may have doubled the patience of each doubling."""
        budget, limits = self.scheduler.budget, self.schedule.limits
        patience = max(FIRST_PATIENCE, limits.max_model_len) << self._failed
        for _ in range(patience * limits.max_batch_tokens.bit_length() + 1):
            if budget.tokens == limits.max_batch_tokens:
                return
            budget.step_succeeded()
        raise Broken("liveness", f"the budget stays at {budget.tokens} of {limits.max_batch_tokens} tokens")

    # -------------------------------------------------------------- poison

    def poison_slot(self, slot: Slot) -> None:
        for name in ("host_in", "device_in", "device_out", "host_out"):
            self.device.poison(getattr(slot, name), f"{name.replace('_', ' ')} {slot.letter}")

    def poison_row(self, row: int) -> None:
        units = np.asarray([row])
        self.device.poison(self._tables.last_token_R, "last token", units)
        # a block table may hold any valid id past the length: the block that is lent first is the most harmful
        self.device.poison(self._tables.block_table_RC, "block table", units, 1)
        for name, table in self._tables.sampling.by_name():
            self.device.poison(table, name, units)

    def poison_blocks(self, ids: NDArray[np.integer]) -> None:
        for layer, cache in enumerate(self.kv):
            self.device.poison(cache.k_BKSD, f"keys {layer}", ids)
            self.device.poison(cache.v_BKSD, f"values {layer}", ids)


def _with_poison(race: Race) -> bool:
    """A race with poison only says that something is still in use."""
    return any(use.what.startswith("released") for use in (race.first, race.second))


def _describe(error: BaseException) -> str:
    trace, where = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        where = f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno} {code.co_name}"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error} ({where})"


def run(schedule: Schedule, parts: Parts | None = None) -> Result:
    """Run one schedule to its end or its first violation."""
    rig = Rig(schedule, parts)
    return rig.run()
