"""What each stage of a step reads and writes, as the owners of the buffers declare it.

Only a device that checks asks for it, right before the stage runs, so it is read off the stage's own inputs. Rows and
KV blocks are declared one by one, slot buffers as a whole: a slot is lent as a whole.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from gapless.attention.base import LayerKV
from gapless.device.base import Access
from gapless.engine.layout import Edits, StepInputs, StepShape
from gapless.engine.slots import Slot
from gapless.engine.tables import DeviceTables
from gapless.plan import Ints


def copy_in_accesses(slot: Slot) -> list[Access]:
    """Of the copy from the host."""
    return [
        Access(f"host in {slot.letter}", slot.host_in, None, False),
        Access(f"device in {slot.letter}", slot.device_in, None, True),
    ]


def copy_masks_accesses(slot: Slot) -> list[Access]:
    """Of the copy of masks from the host."""
    return [
        Access(f"host masks {slot.letter}", slot.host_masks, None, False),
        Access(f"device masks {slot.letter}", slot.device_masks, None, True),
    ]


def copy_out_accesses(slot: Slot) -> list[Access]:
    """Of the copy to the host."""
    accesses = [
        Access(f"device out {slot.letter}", slot.device_out, None, False),
        Access(f"host out {slot.letter}", slot.host_out, None, True),
    ]
    if slot.brings.logprobs or slot.brings.scores:
        accesses += [
            Access(f"device lines {slot.letter}", slot.device_lines, None, False),
            Access(f"host lines {slot.letter}", slot.host_lines, None, True),
        ]
    return accesses


def take_accesses(slot: Slot, rows_A: Ints, token_rows_K: Ints, tables: DeviceTables) -> Generator[Access]:
    """Of giving new rows their features."""
    yield Access(f"device in {slot.letter}", slot.device_in, None, False)
    yield Access("processor arguments", tables.arguments_RP, rows_A, True)
    for name, table in tables.features.by_name():
        yield Access(name, table, rows_A, True)
        yield Access(name, table, token_rows_K, False)


def score_accesses(slot: Slot) -> list[Access]:
    """Of the log probabilities of prompts, beside what the forward has left for them."""
    return [
        Access(f"device in {slot.letter}", slot.device_in, None, False),
        Access(f"device lines {slot.letter}", slot.device_lines, None, True),
    ]


def sample_accesses(slot: Slot, shape: StepShape, edits: Edits, tables: DeviceTables) -> Generator[Access]:
    """Of the second half of the compute stage, beside what the first has left for it."""
    yield Access(f"device in {slot.letter}", slot.device_in, None, False)
    inputs = StepInputs.of(slot.device_in, shape, tables.decodes)
    token_rows_T, sample_rows_S = inputs.token_rows_T.numpy(), inputs.sample_rows_S.numpy()
    if shape.decodes_only:
        if not inputs.continues():
            token_rows_T = sample_rows_S = inputs.sent_rows_E.numpy()
        for name, table in tables.decodes.by_name():
            yield Access(name, table, None, False)
    if edits is not Edits.NONE:
        yield Access("processor arguments", tables.arguments_RP, sample_rows_S, False)
        for name, table in tables.features.by_name():
            yield Access(name, table, np.union1d(token_rows_T, sample_rows_S), False)
        for name, table in (("token counts", tables.features.counts_RV), ("latest tokens", tables.features.last_RH)):
            yield Access(name, table, token_rows_T, True)
    if edits is Edits.MASKED:
        yield Access(f"device masks {slot.letter}", slot.device_masks, None, False)
    if shape.samples:
        for name, table in tables.sampling.by_name():
            yield Access(name, table, sample_rows_S, False)
        yield Access("last token", tables.last_token_R, sample_rows_S, True)
        yield Access(f"device out {slot.letter}", slot.device_out, None, True)
        if edits is not Edits.NONE:
            yield Access(f"device lines {slot.letter}", slot.device_lines, None, True)


def forward_accesses(slot: Slot, shape: StepShape, tables: DeviceTables, kv: Sequence[LayerKV]) -> Generator[Access]:
    """Of its first half: a row's block table after the step's own deltas says which KV blocks it reads."""
    yield Access(f"device in {slot.letter}", slot.device_in, None, False)
    inputs = StepInputs.of(slot.device_in, shape, tables.decodes)
    token_rows_T, positions_T = inputs.token_rows_T.numpy(), inputs.positions_T.numpy()
    rows_E, lengths_E = inputs.rows_E.numpy(), inputs.kv_len_E.numpy()
    updated_U, columns_U, ids_U = (each.numpy() for each in inputs.block_updates())
    if shape.decodes_only:
        for name, table in tables.decodes.by_name():
            yield Access(name, table, None, False)
            yield Access(name, table, None, True)
        if inputs.continues():
            positions_T = positions_T + (rows_E != tables.scratch_row)
        else:
            rows_E = token_rows_T = inputs.sent_rows_E.numpy()
            positions_T = inputs.sent_positions_E.numpy()
        lengths_E = positions_T + 1
    yield Access("block table", tables.block_table_RC, updated_U, True)
    yield Access("block table", tables.block_table_RC, np.union1d(token_rows_T, rows_E), False)
    yield Access("last token", tables.last_token_R, token_rows_T, False)
    for name, table in tables.sampling.by_name():
        yield Access(name, table, inputs.param_rows_A.numpy(), True)
    table_RC = tables.block_table_RC.numpy().copy()
    table_RC[updated_U, columns_U] = ids_U
    block_size = kv[0].block_size
    read_blocks = table_RC[rows_E][np.arange(table_RC.shape[1]) < -(-lengths_E[:, None] // block_size)]
    written_blocks = table_RC[token_rows_T, positions_T // block_size]
    for layer, cache in enumerate(kv):
        for name, tensor in (("keys", cache.k_BKSD), ("values", cache.v_BKSD)):
            yield Access(f"{name} {layer}", tensor, written_blocks, True)
            yield Access(f"{name} {layer}", tensor, read_blocks, False)
