"""What each stage of a step reads and writes, as the owners of the buffers declare it.

Only a device that checks asks for it, right before the stage runs, so it is read off the stage's own inputs. Rows and
KV blocks are declared one by one, slot buffers as a whole: a slot is lent as a whole.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from gapless.attention.base import LayerKV
from gapless.device.base import Access
from gapless.engine.layout import StepInputs, StepShape
from gapless.engine.slots import Slot
from gapless.engine.tables import DeviceTables


def copy_in_accesses(slot: Slot) -> list[Access]:
    """Of the copy from the host."""
    return [
        Access(f"host in {slot.letter}", slot.host_in, None, False),
        Access(f"device in {slot.letter}", slot.device_in, None, True),
    ]


def copy_out_accesses(slot: Slot) -> list[Access]:
    """Of the copy to the host."""
    return [
        Access(f"device out {slot.letter}", slot.device_out, None, False),
        Access(f"host out {slot.letter}", slot.host_out, None, True),
    ]


def compute_accesses(slot: Slot, shape: StepShape, tables: DeviceTables, kv: Sequence[LayerKV]) -> Generator[Access]:
    """Of the compute stage: a row's block table after the step's own deltas says which KV blocks it reads."""
    yield Access(f"device in {slot.letter}", slot.device_in, None, False)
    inputs = StepInputs.of(slot.device_in, shape, tables.decodes)
    token_rows_T, positions_T = inputs.token_rows_T.numpy(), inputs.positions_T.numpy()
    rows_E, lengths_E = inputs.rows_E.numpy(), inputs.kv_len_E.numpy()
    sample_rows_S = inputs.sample_rows_S.numpy()
    updated_U, columns_U, ids_U = (each.numpy() for each in inputs.block_updates())
    if shape.decodes_only:
        for name, table in tables.decodes.by_name():
            yield Access(name, table, None, False)
            yield Access(name, table, None, True)
        if inputs.continues():
            positions_T = positions_T + (rows_E != tables.scratch_row)
        else:
            rows_E = token_rows_T = sample_rows_S = inputs.sent_rows_E.numpy()
            positions_T = inputs.sent_positions_E.numpy()
        lengths_E = positions_T + 1
    yield Access("block table", tables.block_table_RC, updated_U, True)
    yield Access("block table", tables.block_table_RC, np.union1d(token_rows_T, rows_E), False)
    yield Access("last token", tables.last_token_R, token_rows_T, False)
    yield Access("last token", tables.last_token_R, sample_rows_S, True)
    for name, table in tables.sampling.by_name():
        yield Access(name, table, inputs.param_rows_A.numpy(), True)
        yield Access(name, table, sample_rows_S, False)
    table_RC = tables.block_table_RC.numpy().copy()
    table_RC[updated_U, columns_U] = ids_U
    block_size = kv[0].block_size
    read_blocks = table_RC[rows_E][np.arange(table_RC.shape[1]) < -(-lengths_E[:, None] // block_size)]
    written_blocks = table_RC[token_rows_T, positions_T // block_size]
    for layer, cache in enumerate(kv):
        for name, tensor in (("keys", cache.k_BKSD), ("values", cache.v_BKSD)):
            yield Access(f"{name} {layer}", tensor, written_blocks, True)
            yield Access(f"{name} {layer}", tensor, read_blocks, False)
    if shape.samples:
        yield Access(f"device out {slot.letter}", slot.device_out, None, True)
