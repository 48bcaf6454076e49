"""Puts an engine together: sizes the KV cache, allocates tables and slots, captures graphs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from gapless.attention.base import KVSpec, LayerKV
from gapless.config import EngineConfig, SchedulerLimits
from gapless.device.base import Device, Stream
from gapless.engine.admission import Admission, ModelFacts
from gapless.engine.core import Engine
from gapless.engine.fill import fill
from gapless.engine.graphs import GraphTable, StepGraphs, default_buckets, mixed_shapes
from gapless.engine.layout import Edits, StepShape, most_extras, sections_of
from gapless.engine.loop import Loop
from gapless.engine.runner import Runner, copy_in
from gapless.engine.slots import Slot, SlotRing, SlotSizes
from gapless.engine.stage import Extent, Half
from gapless.engine.tables import DeviceTables
from gapless.errors import ConfigError, OutOfMemoryError
from gapless.logits_processor import LogitsProcessor
from gapless.models.base import Model
from gapless.outcome import Committed
from gapless.plan import Ints, empty_plan
from gapless.sampling.base import Sampler
from gapless.sampling.features import mask_words
from gapless.sampling.records import longest_line
from gapless.scheduler import Scheduler

CPU_KV_CACHE_BYTES = 2 * 2**30  # the default on the cpu device, where pages cost memory only once written
GRAPH_WORK = 10**13
"""Weights times tokens of the largest mixed step that is captured: about 30 ms on an H100, which launching a step
without a graph may cost the host. A longer one gives the host time enough."""
LINE_NUMBERS_AT_ONCE = 2**16
_TIMED_REPLAYS = 10
_log = logging.getLogger(__name__)
_SMALLEST_CACHE = 2  # blocks: the null block and one more


@dataclass(frozen=True, slots=True)
class Parts:
    """What a loop is made of. A trace puts subclasses in their place."""

    scheduler: Callable[[SchedulerLimits], Scheduler] = Scheduler
    slots: Callable[[Device, int, SlotSizes], SlotRing] = SlotRing
    loop: Callable[[Scheduler, SlotRing, Runner, Callable[[Committed], None], int], Loop] = Loop


PLAIN = Parts()


def build_engine(
    model: Model,
    config: EngineConfig,
    device: Device,
    sampler: Sampler,
    dtype: torch.dtype,
    parts: Parts = PLAIN,
    processors: Sequence[LogitsProcessor] = (),
) -> Engine:
    """An engine that runs `model`, already on the device, in `dtype`. Raises ConfigError or OutOfMemoryError."""
    names = _names_of(processors)
    loop, limits = build_loop(model, config, device, sampler, dtype, parts, processors)
    admission = Admission(limits, ModelFacts(model.vocab_size, model.eos_token_ids), config.seed, names)
    return Engine(loop, admission, config.stall_seconds)


def build_loop(
    model: Model,
    config: EngineConfig,
    device: Device,
    sampler: Sampler,
    dtype: torch.dtype,
    parts: Parts = PLAIN,
    processors: Sequence[LogitsProcessor] = (),
) -> tuple[Loop, SchedulerLimits]:
    """The loop without its thread, for those who step it themselves, and the sizes it was built with."""
    max_model_len = _context_limit(model, config)
    activation = _measure_activation(model, config, device, sampler, dtype, max_model_len)
    budget = config.token_budget(on_cpu=device.torch_device.type == "cpu")
    shapes = mixed_shapes(config.max_rows, _graph_tokens(model, config, budget), 0)
    kept = graph_share(activation, shapes, budget)
    num_blocks = _count_blocks(model.kv_spec, config, device, dtype, activation + kept)
    if config.max_model_len is None:
        max_model_len = min(max_model_len, (num_blocks - 1) * config.block_size)
    limits = SchedulerLimits(
        max_rows=config.max_rows,
        max_batch_tokens=budget,
        max_model_len=max_model_len,
        block_size=config.block_size,
        num_blocks=num_blocks,
        prefix_cache=config.prefix_cache,
        max_line_numbers=most_line_numbers(model.vocab_size),
        num_processors=len(processors),
    )
    kv = model.kv_spec.allocate(num_blocks, config.block_size, dtype, device.torch_device)
    runner, slots = _build_runner(model, config, device, sampler, kv, limits, parts, processors)
    if config.graphs and device.captures_graphs:
        decodes, mixed = _sizes(runner.graphs)
        model.prepare(decodes, lambda work: _replay_seconds(device, runner.compute, work), also=mixed)
        runner.recapture = lambda: _capture(runner, slots, limits)
        runner.recapture()
    device.run_now(lambda: None, runner.compute)  # weights and tables were written on other streams
    return parts.loop(parts.scheduler(limits), slots, runner, lambda _: None, config.lookahead), limits


def _capture(runner: Runner, slots: SlotRing, limits: SchedulerLimits) -> None:
    begin = perf_counter()
    runner.graphs.capture(slots.slots, capturer(runner, limits))
    _log.info("captured graphs of %d shapes in %.1f s", len(runner.graphs.shapes), perf_counter() - begin)


def _names_of(processors: Sequence[LogitsProcessor]) -> list[str]:
    names = [processor.name for processor in processors]
    if len({*names}) < len(names):
        raise ConfigError(f"two logits processors have the same name: {', '.join(names)}")
    return names


def _context_limit(model: Model, config: EngineConfig) -> int:
    wanted = config.max_model_len
    if wanted is not None and wanted > model.max_position:
        raise ConfigError(f"max_model_len {wanted} is more than the model's context limit of {model.max_position}")
    return model.max_position if wanted is None else wanted


def _build_runner(
    model: Model,
    config: EngineConfig,
    device: Device,
    sampler: Sampler,
    kv: list[LayerKV],
    limits: SchedulerLimits,
    parts: Parts,
    processors: Sequence[LogitsProcessor],
) -> tuple[Runner, SlotRing]:
    on = config.graphs and device.captures_graphs
    graphs = _graph_table(model, config, limits) if on else GraphTable(())
    sizes = slot_sizes(graphs, limits, model.vocab_size)
    slots = parts.slots(device, config.lookahead + 1, sizes)
    rows, columns = limits.max_rows + 1, limits.block_columns
    tables = DeviceTables.allocate(rows, columns, model.vocab_size, len(processors), device.torch_device)
    return _runner_for(device)(model, device, sampler, kv, tables, graphs, processors), slots


def _graph_table(model: Model, config: EngineConfig, limits: SchedulerLimits) -> GraphTable:
    buckets = config.graph_buckets or default_buckets(limits.max_rows)
    tokens = _graph_tokens(model, config, limits.max_batch_tokens)
    return GraphTable(buckets, mixed_shapes(limits.max_rows, tokens, limits.max_block_updates))


def _graph_tokens(model: Model, config: EngineConfig, budget: int) -> int:
    """Most tokens in chunks of a captured step, of at most `budget` tokens."""
    if not (config.graphs and model.captures_chunks):
        return 0
    by_size = GRAPH_WORK // max(model.num_weights, 1)
    return min(by_size if config.graph_tokens is None else config.graph_tokens, budget)


def graph_share(activation: int, shapes: Sequence[StepShape], budget: int) -> int:
    """Bytes that graphs of these shapes keep in their pool, where a step of `budget` tokens takes `activation`."""
    return -(-activation * max((shape.tokens for shape in shapes), default=0) // budget)


def slot_capacity(graphs: GraphTable, limits: SchedulerLimits) -> int:
    """int32 elements that a slot's inputs can need, with a graph or without."""
    rows = limits.max_rows
    without = StepShape(limits.max_batch_tokens, 0, rows, rows, limits.max_block_updates, rows)
    padded = without.with_places(max((shape.decodes for shape in graphs.mixed), default=0))
    return max(sections_of(shape).total for shape in (padded, *graphs.mixed)) + most_extras(limits)


def slot_sizes(graphs: GraphTable, limits: SchedulerLimits, vocab: int) -> SlotSizes:
    """What a slot's buffers must hold."""
    return SlotSizes(slot_capacity(graphs, limits), limits.max_rows, limits.max_batch_tokens, mask_words(vocab))


def most_line_numbers(vocab: int) -> int:
    """int32 numbers of features that may travel with one step: those of a few rows at least."""
    return max(LINE_NUMBERS_AT_ONCE, longest_line(vocab))


def _sizes(graphs: GraphTable) -> tuple[list[int], list[int]]:
    """Numbers of tokens in captured steps that only decode, and the other numbers of tokens and samples in the rest."""
    mixed = {size for shape in graphs.mixed for size in (shape.tokens, shape.samples)}
    return list(graphs.buckets), sorted(mixed - {*graphs.buckets})


def _runner_for(device: Device) -> type[Runner]:
    if device.torch_device.type != "cuda":
        return Runner
    from gapless.engine.triton_runner import TritonRunner

    return TritonRunner


def capturer(runner: Runner, limits: SchedulerLimits) -> Callable[[Slot, StepShape], StepGraphs]:
    """For GraphTable.capture: what captures a step of padding on a slot."""

    def capture(slot: Slot, shape: StepShape) -> StepGraphs:
        extent = Extent(max(1, shape.chunk_tokens), limits.max_model_len, all_greedy=False)
        fill(empty_plan(), _no_tokens(), slot.packed, shape, runner.scratch_row)
        return runner.capture(slot, shape, extent)

    return capture


def _replay_seconds(device: Device, stream: Stream, work: Callable[[], object]) -> float:
    """The shortest time that a graph of the work took: what disturbs a GPU only makes it slower."""

    def run() -> None:
        work()

    device.run_now(run, stream)
    graph = device.capture(run, stream)
    times: list[float] = []
    for _ in range(_TIMED_REPLAYS):
        begin, end = device.event(timed=True), device.event(timed=True)
        stream.record(begin)
        stream.enqueue(graph.replay)
        stream.record(end)
        device.run_now(lambda: None, stream)
        times.append(end.seconds_since(begin))
    return min(times)


def _no_tokens() -> Ints:
    return np.zeros((1, 1), dtype=np.int32)


def _count_blocks(spec: KVSpec, config: EngineConfig, device: Device, dtype: torch.dtype, activation: int) -> int:
    """KV blocks: as given, or as many as the memory that is free after weights and activations holds."""
    block_bytes = spec.bytes_per_block(config.block_size, dtype)
    free, _ = device.memory()
    if config.kv_cache_bytes is not None:
        budget = config.kv_cache_bytes
    elif device.torch_device.type == "cpu":
        budget = min(CPU_KV_CACHE_BYTES, int(free * config.memory_fraction))
    else:
        budget = int(free * config.memory_fraction) - activation
    blocks = budget // block_bytes
    if config.num_blocks is not None:
        blocks = config.num_blocks + 1  # the null block comes on top
    elif config.max_model_len is not None:
        blocks = min(blocks, config.max_rows * -(-config.max_model_len // config.block_size) + 1)
    if blocks < _SMALLEST_CACHE and config.kv_cache_bytes is not None:
        raise ConfigError(
            f"a KV cache of {config.kv_cache_bytes} bytes is too small: it needs {_SMALLEST_CACHE} blocks, and one "
            f"of {config.block_size} tokens takes {block_bytes} bytes"
        )
    if blocks < _SMALLEST_CACHE or blocks * block_bytes > free:
        raise OutOfMemoryError(
            f"the KV cache would get {max(blocks, 0) * block_bytes / 2**20:.0f} MiB of {free / 2**20:.0f} MiB free; "
            f"a block of {config.block_size} tokens takes {block_bytes / 2**20:.2f} MiB. Ask for a smaller cache, "
            "fewer tokens in a batch, or use a smaller model or dtype"
        )
    return blocks


def _measure_activation(
    model: Model, config: EngineConfig, device: Device, sampler: Sampler, dtype: torch.dtype, max_model_len: int
) -> int:
    """Bytes that the largest step needs beside weights and cache; runs it once where the device counts memory."""
    before = device.peak_bytes(reset=True)
    if not before:
        return 0
    tokens, columns = config.token_budget(on_cpu=False), -(-max_model_len // config.block_size)
    entries = min(config.max_rows, tokens)
    chunks = sorted(min(max_model_len, len(part)) for part in np.array_split(np.arange(tokens), entries))
    plan = dataclasses.replace(
        empty_plan(),
        rows_E=np.zeros(len(chunks), dtype=np.int32),
        starts_E=np.zeros(len(chunks), dtype=np.int32),
        counts_E=np.asarray(chunks, dtype=np.int32),
        samples_E=np.ones(len(chunks), dtype=np.int32),
        num_samples=len(chunks),
        num_tokens=sum(chunks),
        num_decodes=sum(count == 1 for count in chunks),
    )
    shape = StepShape.of(plan)
    if config.graphs and model.captures_chunks:  # decodes may be padded
        shape = shape.with_places(shape.decodes + config.max_rows)
    kv = model.kv_spec.allocate(_SMALLEST_CACHE, config.block_size, dtype, device.torch_device)
    tables = DeviceTables.allocate(config.max_rows + 1, columns, model.vocab_size, 0, device.torch_device)
    words = mask_words(model.vocab_size)
    slot = Slot(0, device, SlotSizes(sections_of(shape).total, config.max_rows, tokens, words))
    runner = _runner_for(device)(model, device, sampler, kv, tables, GraphTable(()))
    fill(plan, np.zeros((1, max_model_len), dtype=np.int32), slot.packed, shape, 0)
    extent = Extent(max(chunks), max(chunks), all_greedy=False)

    def largest_step() -> None:
        half = Half()
        copy_in(slot, sections_of(shape).total)
        runner.forward(slot, shape, extent, half)
        runner.finish(slot, shape, extent, half, Edits.MASKED)

    before = device.peak_bytes(reset=True)
    device.run_now(largest_step, runner.compute)
    return device.peak_bytes(reset=True) - before
