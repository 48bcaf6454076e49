"""What an engine is built with: graphs of mixed steps as far as they are asked for, and memory put by for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.config import EngineConfig, SchedulerLimits
from gapless.device.cpu import CpuDevice
from gapless.device.null import NullDevice
from gapless.engine.build import build_loop, graph_share, slot_capacity
from gapless.engine.graphs import CHUNK_TOKENS, GraphTable, mixed_shapes
from gapless.engine.layout import StepShape, sections_of
from gapless.engine.loop import Loop
from gapless.sampling.torch_sampler import TorchSampler
from support.hash_model import HashModel


class CountingDevice(CpuDevice):
    """Counts memory, so that the largest step is measured."""

    def peak_bytes(self, *, reset: bool = False) -> int:
        return 1


class ObservedModel(HashModel):
    """Remembers the batches that it saw."""

    def __init__(self, weights: int = 0) -> None:
        super().__init__()
        self.num_weights = weights
        self.batches: list[tuple[list[int], list[int], int]] = []

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        counts = batch.query_start_E1.diff().tolist()
        self.batches.append((counts, batch.kv_len_E.tolist(), batch.num_decodes))
        return super().forward(tokens_T, kv, batch)


def built(model: HashModel, **options: Any) -> Loop:
    config = EngineConfig(num_blocks=40, block_size=4, **options)
    return build_loop(model, config, NullDevice(), TorchSampler(), torch.float32)[0]


@pytest.mark.parametrize(
    ("weights", "options", "largest"),
    [
        (0, {}, 256),
        (10**11, {}, 64),  # 10**13 / 10**11 is 100 tokens
        (10**12, {}, 0),
        (10**12, {"graph_tokens": 128}, 128),
        (0, {"graph_tokens": 0}, 0),
        (0, {"graph_tokens": 10**6}, 256),
        (0, {"graph_tokens": 63}, 0),
        (0, {"graphs": False}, 0),
        (0, {"graphs": False, "graph_tokens": 128}, 0),
    ],
)
def test_mixed_steps_are_captured_up_to_what_is_asked_for_or_the_model_makes_worth(
    weights: int, options: dict[str, int], largest: int
):
    graphs = built(ObservedModel(weights), **options).runner.graphs
    sizes = {shape.chunk_tokens for shape in graphs.mixed}
    assert sizes == {tokens for tokens in CHUNK_TOKENS if tokens <= largest}


@pytest.mark.parametrize(("rows", "tokens"), [(1, 64), (4, 6), (5, 9), (8, 8), (7, 100)])
def test_the_step_that_is_measured_is_one_that_can_be(rows: int, tokens: int):
    model, device = ObservedModel(), CountingDevice()
    config = EngineConfig(num_blocks=40, block_size=4, max_rows=rows, max_batch_tokens=tokens)
    build_loop(model, config, device, TorchSampler(), torch.float32)
    device.close()
    [(counts, lengths, decodes)] = model.batches
    assert sum(counts) == tokens + rows  # decodes are padded by no more
    assert counts == lengths
    assert [count == 1 for count in counts] == [True] * decodes + [False] * (len(counts) - decodes)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 64), (16, 64), (17, 64), (60, 120), (300, 300), (1024, 8192)])
def test_a_slot_holds_every_captured_step_and_every_other(rows: int, tokens: int):
    limits = SchedulerLimits(max_rows=rows, max_batch_tokens=tokens, max_model_len=4096, block_size=1024, num_blocks=9)
    graphs = GraphTable((rows,), mixed_shapes(rows, tokens, limits.max_block_updates))
    capacity = slot_capacity(graphs, limits)
    assert graphs.mixed
    assert all(sections_of(shape).total <= capacity for shape in graphs.shapes)
    assert capacity >= sections_of(StepShape(tokens, 0, rows, rows, limits.max_block_updates, rows)).total
    for decodes, length in ((0, tokens), (1, tokens - 1), (rows - 1, tokens - rows + 1)):
        exact = StepShape(decodes + length, decodes, decodes + 1, rows, limits.max_block_updates, rows)
        assert sections_of(graphs.pad_decodes(exact)).total <= capacity
    assert max(shape.samples for shape in graphs.shapes) <= rows  # the places of device_out


def test_slots_are_made_as_large_as_their_capacity():
    loop = built(ObservedModel(), max_rows=64, max_batch_tokens=64)
    slot, graphs = loop.slots.slots[0], loop.runner.graphs
    assert slot.packed.size >= max(sections_of(shape).total for shape in graphs.mixed)


def test_steps_with_chunks_are_not_captured_where_attention_reads_their_lengths():
    model = ObservedModel()
    model.captures_chunks = False
    graphs = built(model).runner.graphs
    assert graphs.buckets
    assert not graphs.mixed


def test_graphs_keep_as_much_as_the_largest_of_them_needs():
    shapes = mixed_shapes(64, 128, 9)
    assert max(shape.tokens for shape in shapes) == 64 + 128
    assert graph_share(1000, shapes, 256) == 750
    assert graph_share(1000, (), 256) == 0
