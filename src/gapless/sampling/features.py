"""What single requests ask of their logits, on the device: penalties, bias, bans, allowed tokens, logprobs.

The order of the edits, in float32, on logits cleaned as base.py says:
    1. repetition: what stands in the prompt or was generated; a negative score is multiplied, another divided
    2. score - count * frequency - presence, for tokens that were generated `count` > 0 times
    3. bias, added
    4. -inf: bans, bad words, what is not allowed
Then temperature and filters as for any row. Each operation rounds once (no fused multiply-add). A row whose tokens are
all banned gives token 0, as a row of -inf does.

A row's tokens are counted when a step feeds them, not when it samples them: so token N counts when N + 1 is sampled,
whatever is in flight; and a row that is recomputed counts again from nothing, as taking it empties its counts.

Letters behind a name, beside those of base.py:
    W words of 32 tokens, H latest tokens, X numbers of a record, M masks of a step, T tokens that a step feeds
    A rows taken in a step, P numbers that are sent for them
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

PENALTIES: Final = 1
BIAS: Final = 2
ALLOWED: Final = 4
BANS: Final = 8
BAD_WORDS: Final = 16
LOGPROBS: Final = 32
MASKED: Final = 64  # a step's mask must come with every sample of this row
PROCESSED: Final = 128  # it has arguments for logits processors; nothing that these kernels do
EDITS: Final = PENALTIES | BIAS | ALLOWED | BANS | BAD_WORDS | MASKED
LISTS: Final = BIAS | BANS | BAD_WORDS

IN_PROMPT: Final = 1 << 30  # of a token's count; the bits below say how often it was generated
WORD_BITS: Final = 32

MAX_BIAS: Final = 1024
MAX_BANS: Final = 256
MAX_BAD_WORDS: Final = 128
BAD_WORD_TOKENS: Final = 16  # of one sequence at most; a power of two
RECORD_HEADER: Final = 3  # how many biases, bans, bad words
RECORD_SIZE: Final = RECORD_HEADER + 2 * MAX_BIAS + 2 * MAX_BANS + BAD_WORD_TOKENS * MAX_BAD_WORDS
ANY_TOKEN: Final = -1  # fills up a bad word's line, and stands where a row has no token yet

MAX_LOGPROBS: Final = 20


def mask_words(vocab: int) -> int:
    """int32 words of a bit mask over the vocabulary."""
    return -(-vocab // WORD_BITS)


@dataclass(frozen=True, slots=True)
class FeatureTables:
    """One line per table row (the last is scratch, and stays plain); written when a row is taken, counted on.

    A row whose flags are 0 is plain: no kernel looks at the rest of its line, which may be stale.
    """

    flags_R: Tensor  # int32
    prompt_len_R: Tensor  # int32
    num_logprobs_R: Tensor  # int32: -1 none, 0 of the sampled token only
    repetition_R: Tensor  # float32; 1 changes nothing
    presence_R: Tensor  # float32
    frequency_R: Tensor  # float32
    counts_RV: Tensor  # int32: how often the row has generated the token; IN_PROMPT
    last_RH: Tensor  # int32: the token at position p is at p % H; ANY_TOKEN before there are so many
    record_RX: Tensor  # int32: see records.py
    allowed_RW: Tensor  # int32: bit t % 32 of word t // 32 allows token t

    @staticmethod
    def allocate(rows: int, vocab: int, device: torch.device) -> FeatureTables:
        """Tables of plain rows, scratch row included in the count. They take about 4 * rows * vocab bytes."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return FeatureTables(
            flags_R=zeros(rows),
            prompt_len_R=zeros(rows),
            num_logprobs_R=zeros(rows) - 1,
            repetition_R=zeros(rows, dtype=torch.float32) + 1.0,
            presence_R=zeros(rows, dtype=torch.float32),
            frequency_R=zeros(rows, dtype=torch.float32),
            counts_RV=zeros(rows, vocab),
            last_RH=zeros(rows, BAD_WORD_TOKENS),
            record_RX=zeros(rows, RECORD_SIZE),
            allowed_RW=zeros(rows, mask_words(vocab)),
        )

    @property
    def vocab(self) -> int:
        return self.counts_RV.shape[1]

    def by_name(self) -> tuple[tuple[str, Tensor], ...]:
        """Every table with its name."""
        return (
            ("feature flags", self.flags_R),
            ("prompt length", self.prompt_len_R),
            ("logprobs", self.num_logprobs_R),
            ("repetition penalty", self.repetition_R),
            ("presence penalty", self.presence_R),
            ("frequency penalty", self.frequency_R),
            ("token counts", self.counts_RV),
            ("latest tokens", self.last_RH),
            ("feature record", self.record_RX),
            ("allowed tokens", self.allowed_RW),
        )


@dataclass(frozen=True, slots=True)
class StepMasks:
    """Bit masks of one step, laid out as FeatureTables.allowed_RW; they come on top of it.

    An entry whose index is -1 has none: if its row is MASKED, nothing is allowed. So it is too with an index of M or
    above.
    """

    mask_MW: Tensor  # int32
    index_E: Tensor  # int32: the entry's line in mask_MW

    def of(self, chosen_E: Tensor) -> StepMasks:
        """The masks of some of the entries."""
        return StepMasks(self.mask_MW, self.index_E[chosen_E])
