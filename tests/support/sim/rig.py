"""Runs a schedule on the simulated device and says what went wrong, if anything did."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from gapless.budget import FIRST_PATIENCE
from gapless.device.sim import Race, RandomOrder
from gapless.device.sim.streams import UNDECLARED
from gapless.engine.admission import ModelFacts
from gapless.engine.build import capturer, slot_sizes
from gapless.engine.slots import Slot
from gapless.engine.tables import DeviceTables
from gapless.errors import InternalError
from gapless.outcome import Committed, Finished
from gapless.plan import Plan
from gapless.request import FinishReason, Request
from gapless.rows import RowState
from support.hash_model import VOCAB
from support.sim.findings import Broken, Violation
from support.sim.forms import Endings, Tilt
from support.sim.lines import Lines
from support.sim.oracle import form_of, reason_of
from support.sim.owners import Owners, Shared
from support.sim.parts import Parts
from support.sim.rig_device import RigDevice, RigSampler
from support.sim.schedule import TARGETED, Move, Schedule, Shortage


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
    prompt_lines: int = 0  # log probabilities of prompts
    token_lines: int = 0  # and of sampled tokens
    masked_steps: int = 0
    restarted: int = 0  # answers that began again
    moves: dict[int, Move] = field(default_factory=dict[int, Move])  # by request, with the weights of its answer
    commands: Counter[str] = field(default_factory=Counter[str])  # done between steps, by kind


class Rig:
    """One engine on the simulated device, with the schedule's moves at its phase boundaries."""

    def __init__(self, schedule: Schedule, parts: Parts | None = None) -> None:
        self.schedule = schedule
        self.parts = parts = parts or Parts()
        order = RandomOrder(schedule.order_seed, schedule.eagerness)
        audit = parts.audit or schedule.audit
        self.device = device = parts.device(order, parts, captures_graphs=schedule.graphs, audit=audit)
        self.requests: list[Request] = []  # their ids count all arrivals, from 0
        self._added: list[list[Request]] = []  # by move
        self.owners = Owners(schedule.limits, parts.expected)
        self.lines = Lines(self.owners)
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, Finished] = {}
        self.ended: set[int] = set()  # requests whose end the engine has told, read or not
        self.cancelled: set[int] = set()  # before their end was told
        self.steps = 0
        self._shortage: list[Shortage] = []
        self._moves = deque(schedule.moves)
        self._points = self._arrivals = 0
        limits = schedule.limits
        model, cpu = parts.model(), torch.device("cpu")
        facts = ModelFacts(model.vocab_size, model.eos_token_ids)
        self.admission = parts.admission(limits, facts, 7, [Tilt.name])
        self.kv = model.kv_spec.allocate(limits.num_blocks, limits.block_size, torch.float32, cpu)
        rows, columns = limits.max_rows + 1, limits.block_columns
        self._tables = DeviceTables.allocate(rows, columns, VOCAB, limits.num_processors, cpu)
        graphs = parts.graphs(schedule.buckets, schedule.mixed)
        sampler = RigSampler(parts.sampler(), device)
        runner = parts.runner(model, device, sampler, self.kv, self._tables, graphs, [Tilt()])
        slots = parts.slots(device, schedule.lookahead + 1, slot_sizes(graphs, limits, VOCAB))
        runner.rig = slots.rig = self
        if schedule.graphs:
            runner.recapture = lambda: graphs.capture(slots.slots, capturer(runner, limits))
            runner.recapture()
        self.scheduler = parts.scheduler(limits, self)
        device.pool = self.scheduler.pool
        device.run_now(lambda: None, runner.compute)
        self.loop = parts.loop(self.scheduler, slots, runner, self._publish, schedule.lookahead)
        self.loop.masking = self.masking = parts.masking(self)
        self.engine = parts.engine(self.loop, self.admission, self)
        self.loop.publish = self._publish
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
        memory |= self._tables.features.by_name()
        memory |= {"processor arguments": self._tables.arguments_RP}
        for layer, cache in enumerate(self.kv):
            memory |= {f"keys {layer}": cache.k_BKSD, f"values {layer}": cache.v_BKSD}
        for slot in self.loop.slots.slots:
            for name in ("device_in", "device_out", "device_lines", "device_masks"):
                memory[f"{name.replace('_', ' ')} {slot.letter}"] = getattr(slot, name)
        return memory

    # ------------------------------------------------------------- the run

    def run(self) -> Result:
        """To the end, or to the first violation."""
        violation = None
        try:
            self.engine.run_here()
        except Broken as broken:
            violation = broken.violation
        except Exception as error:  # noqa: BLE001 - whatever it is, the schedule has found it
            violation = Violation("books" if isinstance(error, InternalError) else "error", _describe(error))
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
            self.lines.of_prompts,
            self.lines.of_tokens,
            sum(span.name == "masks" for span in self.device.timeline.spans),
            self._restarted,
            self.owners.moves,
            self.engine.done,
        )

    def go_on(self, *, paused: bool) -> None:
        """The engine waits for something to do: the next move, or the end. Who pauses goes on before that."""
        if self._moves:
            self._points = max(self._points, self._moves[0].point)
            self._act()
        elif paused:
            self.engine.ask(Move(self._points, "wake"))
        else:
            self._read(0)
            self._check_end()
            self.engine.request_stop()

    def check_step(self) -> None:
        """After each step, before what was asked for is done."""
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
        self.masking.work_on()

    _asked = 0  # preemptions by moves
    _failed = 0  # steps that ran out of memory
    _most_placeholders = 0  # of one sequence
    _restarted = 0  # answers
    _void = 0  # tokens of theirs

    def count_failure(self) -> None:
        """A step has run out of memory."""
        self._failed += 1

    def take_memory(self, plan: Plan) -> None:
        """The step is about to be launched: whether it runs out of memory, and where."""
        has = {"take rows": plan.lines is not None, "score": plan.scores is not None, "copy masks": plan.masked}
        has["sample"] = plan.featured or plan.scores is not None  # else it is a part of the forward's work
        for place in self._shortage:
            if has.get(place.partition(" ")[2], True):
                self.device.shortages[plan.step] = place
                self._shortage.remove(place)
                break

    def _act(self) -> None:
        while self._moves and self._moves[0].point <= self._points:
            move = self._moves.popleft()
            if move.kind == "add":
                self._add(move)
            elif move.kind == "exhaust":
                self._shortage.append(move.where)
                self.device.moment(f"memory is short {move.where}")
            elif move.kind not in TARGETED:
                self.device.moment(move.kind)
                self.engine.ask(move)
            elif move.target < len(self._added) and move.place < len(self._added[move.target]):
                request_id = self._added[move.target][move.place].request_id
                if move.kind == "cancel":
                    if request_id not in self.ended:
                        self.cancelled.add(request_id)
                    self.scheduler.cancel(request_id)
                else:
                    self._preempt(request_id)
                self.device.moment(f"{move.kind} request {request_id}")
            self.engine.ring()

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
        params = move.params
        if move.form is not None:
            params = replace(params, allowed_tokens=_nobody_asks)
        if move.endings:
            params = replace(params, stop=("of tokens",))
        first = self.admission.make_request(
            move.prompt,
            params,
            priority=move.priority,
            cache_salt=move.salt,
            stops=Endings(move.endings) if move.endings else None,
            bad_words=[word for word in params.bad_words if not isinstance(word, str)],
            form=form_of(move.form, move.params),
        )
        self._added.append([first, *self.admission.make_continuations(first)])
        if len({request.seed for request in self._added[-1]}) != params.n:
            raise Broken("books", f"{params.n} answers were asked for, each with random numbers of its own")
        for request in self._added[-1]:
            self._enter(request, move)

    def _enter(self, request: Request, move: Move) -> None:
        if request.request_id != self._arrivals:
            raise Broken("books", f"request {self._arrivals} got the id {request.request_id}")
        self._arrivals += 1
        self.requests.append(request)
        if request.leader >= 0:
            move = replace(move, params=replace(move.params, seed=request.seed, prompt_logprobs=None))
        self.owners.add(request.request_id, move, request.leader)
        self.tokens[request.request_id] = []
        self.scheduler.add(request)
        self.engine.ring()
        self.device.moment(f"add request {request.request_id}")

    # --------------------------------------------------------- between steps

    def update(self, key: int) -> None:
        """The weights change. What is known by now comes from those before."""
        self.check_idle("the weights change")
        self._read(0)
        going_on = self.tokens.keys() - self.finished.keys() - self.ended - self.cancelled
        known = {each: (len(self.tokens[each]), self.lines.scored.get(each, 0)) for each in going_on}
        in_flight = self.engine.in_hand.in_flight
        self._to_restart = {each for each in going_on if in_flight == "restart" and any(known[each])}
        self.owners.update(key, in_flight, known)

    _to_restart: set[int] = set()  # noqa: RUF012 - replaced, never changed

    def check_idle(self, what: str) -> None:
        """Nothing may be in flight where the host works between two steps."""
        if any(slot.in_flight for slot in self.loop.slots.slots) or not self.device.idle:
            raise Broken("books", f"{what} with a step in flight")

    def check_begin(self, request: Request) -> None:
        """Nobody begins while those that have begun are waited for, but whose leader will never begin."""
        gone = request.leader in self.ended | self.cancelled
        if self.engine.holds_back and not gone and not self.owners.has_begun(request.request_id):
            raise Broken("books", f"request {request.request_id} begins, and those that have begun are to end first")

    # ---------------------------------------------------------- the consumer

    def _publish(self, committed: Committed) -> None:
        self.engine.outputs.put(committed)
        self.boundary("published")

    def _read(self, leave: int) -> None:
        """The consumer, who may be late."""
        while self.engine.outputs.qsize() > leave:
            record = self.engine.outputs.get()
            assert isinstance(record, Committed)
            self._read_restarts(record.restarted)
            for piece in record.prompts:
                if piece.request_id in self.finished:
                    raise Broken("logprobs", f"request {piece.request_id} got some of its prompt after its end")
                self.lines.read_prompt(piece)
            for index, (request_id, token) in enumerate(
                zip(record.request_ids.tolist(), record.tokens.tolist(), strict=True)
            ):
                if request_id in self.finished:
                    raise Broken("tokens", f"request {request_id} got token {token} after its end")
                if request_id not in self.tokens:
                    raise Broken("tokens", f"token {token} for request {request_id}, which nobody made")
                self.lines.read(request_id, self.tokens[request_id], token, record.logprobs, index)
                self.tokens[request_id].append(token)
            for end in record.finished:
                if end.request_id in self.finished:
                    raise Broken("tokens", f"request {end.request_id} ended twice")
                self.finished[end.request_id] = end
                self._check_request(end)

    def _read_restarts(self, restarted: tuple[int, ...]) -> None:
        """What these have so far is void."""
        if restarted and set(restarted) != self._to_restart:
            raise Broken("tokens", f"requests {restarted} are said to begin again, not {self._to_restart}")
        for request_id in restarted:
            self._restarted += 1
            self._void += len(self.tokens[request_id])
            self.tokens[request_id] = []
            self.lines.scored.pop(request_id, None)

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
        reason, ending = reason_of(move, want, self.schedule.limits)
        if end.reason is FinishReason.CANCELLED:
            want = want[: len(got)]
        elif (end.reason, end.stop) != (reason, ending):
            raise Broken("tokens", f"{name} ended by {end.reason.value}, alone it ends by {reason.value} {want[-1:]}")
        elif (end.error is not None) != (reason is FinishReason.ERROR):
            raise Broken("tokens", f"{name} ended by {end.reason.value} and the error {end.error}")
        if got != want:
            at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
            raise Broken("tokens", f"{name} differs at token {at}: {got[at : at + 3]} in place of {want[at : at + 3]}")
        if end.cached != (cached := self.owners.begins.get(end.request_id, 0)):
            raise Broken("books", f"{name} began at token {cached}, and {end.cached} are said to be cached")

    def _check_end(self) -> None:
        """Everything is back where it was."""
        self.engine.check_end()
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
        self.check_features()
        self._check_budget()
        if any(span.name == UNDECLARED for span in self.device.timeline.spans):
            raise Broken("books", "work was queued that does not declare what it touches")
        stats = scheduler.stats
        if stats.generated_tokens != self._void + sum(map(len, self.tokens.values())):
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
        early = ends.count(FinishReason.CANCELLED) + ends.count(FinishReason.ERROR)
        allowed = ends.count(FinishReason.STOP) * ahead + early * (ahead + 1)
        if scheduler.stats.overshoot_rows > allowed:
            raise Broken("tokens", f"{scheduler.stats.overshoot_rows} overshoot rows, at most {allowed} can be")

    def check_features(self) -> None:
        """While nothing is in flight: rows of the device that ask something are known to, so that it can be undone."""
        asks = self._tables.features.flags_R.numpy()[:-1] != 0
        if forgotten := np.flatnonzero(asks & ~self.scheduler.rows.stale).tolist():
            raise Broken("books", f"the features of rows {forgotten} are on the device, and nobody knows")

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
        for name in ("in", "out", "lines", "masks"):
            for side in ("host", "device"):
                self.device.poison(getattr(slot, f"{side}_{name}"), f"{side} {name} {slot.letter}")

    def poison_row(self, row: int) -> None:
        units = np.asarray([row])
        self.device.poison(self._tables.last_token_R, "last token", units)
        # a block table may hold any valid id past the length: the block that is lent first is the most harmful
        self.device.poison(self._tables.block_table_RC, "block table", units, 1)
        for name, table in self._tables.sampling.by_name():
            self.device.poison(table, name, units)
        for name, table in self._tables.features.by_name():
            # A plain row's are 0 and stay so if its next owner is plain: nothing is sent then.
            if name == "feature record":  # one of each list, since sizes that are rubbish would be a crash
                self.device.poison(table, name, units, 1)
            elif name not in ("feature flags", "logprobs") or self.scheduler.rows.stale[row]:
                self.device.poison(table, name, units)

    def poison_blocks(self, ids: NDArray[np.integer]) -> None:
        for layer, cache in enumerate(self.kv):
            self.device.poison(cache.k_BKSD, f"keys {layer}", ids)
            self.device.poison(cache.v_BKSD, f"values {layer}", ids)


def _nobody_asks(tokens: Sequence[int]) -> Sequence[int]:
    """Stands for a function of the caller where the request brings its form itself."""
    raise InternalError(f"the function was asked what may follow {tokens}")


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
