"""What the engine needs of a model. Tests bring models of their own (one whose next token is a hash of its prefix)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from gapless.attention.base import AttentionBatch, KVSpec, LayerKV


class Model(Protocol):
    """A decoder on one device. H hidden size, V vocabulary size; other letters as in attention/base.py."""

    vocab_size: int
    max_position: int
    eos_token_ids: tuple[int, ...]
    kv_spec: KVSpec
    num_weights: int  # that each token is multiplied with
    captures_chunks: bool  # as its attention does

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        """Append the tokens (int32) to the cache and return the final hidden states [T, H] before the head's norm.

        No synchronisation and no data-dependent host work; may be captured in a graph.
        """
        ...

    def prepare(
        self,
        batch_sizes: Sequence[int],
        seconds_of: Callable[[Callable[[], object]], float],
        *,
        also: Sequence[int] = (),
    ) -> None:
        """Before graphs are captured for steps of these many tokens: choose kernels, if there is a choice.

        seconds_of  captures work as a graph and gives the time of its replay.
        also        more numbers of tokens of captured steps; only batch_sizes are worth the time that a choice takes
        """
        ...

    def tensors(self) -> Iterable[Tensor]:
        """All memory that it has on its device: weights and tables."""
        ...

    def check_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises CorruptModelError if one of them is not a weight of this model, or not of its shape."""
        ...

    def update_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Put these values in the place of the old ones, where graphs look for them. Checked before."""
        ...

    def logits(self, hidden_EH: Tensor) -> Tensor:
        """Next-token logits [E, V] of chosen hidden states, in the model's dtype."""
        ...
