"""The hash model and a sampler in numpy, several times faster on tiny batches, and their answers in closed form.

The sampler mixes every sampling parameter of the row into the token that it draws, so one that is stale or belongs to
another request changes the token, which real sampling would often hide.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.config import SchedulerLimits
from gapless.request import SamplingParams
from gapless.sampling.base import SamplingTables
from gapless.sampling.features import FeatureTables, StepMasks
from support.hash_model import EOS, MISPLACED, NOT_COMPUTED, VOCAB, HashModel, position_weights, scores

if TYPE_CHECKING:
    from support.sim.schedule import Move

_PRIME = 2_147_483_629
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_MAX_LENGTH = 256
_AT = np.arange(_MAX_LENGTH)
_WEIGHTS: NDArray[np.int64] = position_weights(_MAX_LENGTH).numpy()


class NumpyHashModel(HashModel):
    """HashModel, hashing only the last token of each entry."""

    def __init__(self) -> None:
        super().__init__(_MAX_LENGTH)

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        keys_BS = kv[0].k_BKSD.numpy()[:, 0, :, 0]
        values_BS = kv[0].v_BKSD.numpy()[:, 0, :, 0]
        size = keys_BS.shape[1]
        table_RC = batch.block_table_RC.numpy()
        positions_T = batch.positions_T.numpy()
        blocks_T = table_RC[batch.token_rows_T.numpy(), positions_T // size]
        keys_BS[blocks_T, positions_T % size] = tokens_T.numpy()
        values_BS[blocks_T, positions_T % size] = positions_T
        starts_E1 = batch.query_start_E1.numpy()
        decodes = min(batch.num_decodes, starts_E1.size - 1)
        last_E = starts_E1[1:] - 1
        last_E[:decodes] = _AT[:decodes]
        length = min(batch.max_kv, table_RC.shape[1] * size)
        table_EC = table_RC[batch.rows_E.numpy(), : -(-length // size)]
        seen_EL = keys_BS[table_EC].reshape(last_E.size, -1)[:, :length]
        where_EL = values_BS[table_EC].reshape(last_E.size, -1)[:, :length]
        at_L = _AT[:length]
        valid_EL = at_L < batch.kv_len_E.numpy()[:, None]
        tokens_EL = np.where(np.isfinite(seen_EL), seen_EL, -7.0).astype(np.int64)
        terms_EL = (tokens_EL + 1) * _WEIGHTS[:length] % _PRIME
        misplaced_E = (valid_EL & (where_EL != at_L)).sum(1)
        hashes_E = (terms_EL * valid_EL).sum(1) % _PRIME + misplaced_E * MISPLACED
        hashes_E[decodes:][np.diff(starts_E1[decodes:]) > batch.max_query] = NOT_COMPUTED
        hidden_TH = np.full((positions_T.size, 1), NOT_COMPUTED, dtype=np.int64)
        has_tokens_E = np.ones(last_E.size, dtype=np.bool_)
        has_tokens_E[decodes:] = np.diff(starts_E1[decodes:]) > 0
        hidden_TH[last_E[has_tokens_E], 0] = hashes_E[has_tokens_E]
        return torch.from_numpy(hidden_TH)

    def logits(self, hidden_EH: Tensor) -> Tensor:
        return scores(hidden_EH[:, 0]).float()


def _mix(greedy: NDArray[np.int64], words: Sequence[NDArray[np.integer]]) -> NDArray[np.int64]:
    """A token from the greedy one and everything that may make a difference."""
    with np.errstate(over="ignore"):
        z = greedy.astype(np.uint64) + _GOLDEN
        for word in words:
            z = (z ^ word.astype(np.int64).astype(np.uint64)) * _MIX
            z ^= z >> np.uint64(29)
    return (z % np.uint64(VOCAB)).astype(np.int64)


class MixSampler:
    """Implements sampling.base.Sampler, with an answer that depends on every parameter."""

    def sample(
        self,
        logits_EV: Tensor,
        rows_E: Tensor,
        positions_E: Tensor,
        tables: SamplingTables,
        *,
        all_greedy: bool,
        features: FeatureTables | None = None,
        masks: StepMasks | None = None,
    ) -> Tensor:
        greedy_E = logits_EV.numpy().argmax(1)
        if all_greedy:
            return torch.from_numpy(greedy_E.astype(np.int32))
        rows = rows_E.numpy()
        temperature_E = tables.temperature_R.numpy()[rows]
        seed_E2 = tables.seed_R2.numpy()[rows]
        words = [
            seed_E2[:, 0],
            seed_E2[:, 1],
            positions_E.numpy(),
            temperature_E.view(np.int32),
            tables.top_k_R.numpy()[rows],
            tables.top_p_R.numpy()[rows].view(np.int32),
            tables.min_p_R.numpy()[rows].view(np.int32),
        ]
        drawn_E = np.where(temperature_E == 0.0, greedy_E, _mix(greedy_E, words))
        return torch.from_numpy(drawn_E.astype(np.int32))


def stops_of(params: SamplingParams) -> set[int]:
    """The tokens that end a request."""
    return {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}


def answer(move: Move, limits: SchedulerLimits) -> list[int]:
    """What the request that this move adds gets, whatever else happens, computed with no engine: stop token included.

    A request that draws random numbers must bring its seed.
    """
    return list(continuation(move.prompt, move.params, limits.max_model_len))


@lru_cache(maxsize=20_000)
def continuation(prompt_tokens: tuple[int, ...], params: SamplingParams, max_length: int) -> tuple[int, ...]:
    """The answer to a prompt where the context ends at `max_length`."""
    prompt = np.asarray(prompt_tokens, dtype=np.int64)
    floats = np.asarray([params.temperature, params.top_p, params.min_p], dtype=np.float32).view(np.int32)
    stops, end = stops_of(params), max_length
    if params.max_tokens is not None:
        end = min(end, prompt.size + params.max_tokens)
    total = int(((prompt + 1) * _WEIGHTS[: prompt.size] % _PRIME).sum() % _PRIME)
    tokens: list[int] = []
    for position in range(prompt.size, end):
        token = int(scores(torch.tensor([total]))[0].argmax())
        if params.temperature > 0:
            assert params.seed is not None
            low, high = np.asarray([params.seed], dtype=np.uint64).view(np.int32)
            words = [low, high, position, floats[0], params.top_k, floats[1], floats[2]]
            token = int(_mix(np.asarray([token]), [np.asarray([word], dtype=np.int64) for word in words])[0])
        tokens.append(token)
        if token in stops:
            break
        total = (total + (token + 1) * int(_WEIGHTS[position])) % _PRIME
    return tuple(tokens)
