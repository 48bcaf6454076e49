"""A model with nothing to compute, for devices that do nothing or only keep time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, KVSpec, LayerKV


class TinyModel:
    """Implements models/base.py `Model`; every token is 0."""

    max_position = 2**20
    eos_token_ids: tuple[int, ...] = ()
    kv_spec = KVSpec(num_layers=1, num_kv_heads=1, head_dim=1)
    num_weights = 0
    captures_chunks = True

    def __init__(self, vocab_size: int = 32000) -> None:
        self.vocab_size = vocab_size

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        return tokens_T

    def tensors(self) -> Iterable[Tensor]:
        return ()

    def check_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """It has none."""

    def update_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """It has none."""

    def logits(self, hidden_EH: Tensor) -> Tensor:
        return torch.zeros(hidden_EH.shape[0], self.vocab_size)

    def prepare(
        self,
        batch_sizes: Sequence[int],
        seconds_of: Callable[[Callable[[], object]], float],
        *,
        also: Sequence[int] = (),
    ) -> None:
        return
