"""How a request's features travel to the device: one line of int32 per row that is taken.

    header    LINE_HEADER numbers: flags, prompt length, logprobs, three penalties (float32 bits), sizes of what follows
    record    the row's lists, only as long as they are:
              how many biases, bans and bad words there are (b, n, w)
              b token ids, then b values (float32 bits)
              n token ids, then for each the first position at which it may be sampled
              w bad words of BAD_WORD_TOKENS numbers: the last token, which is banned, then those before it, backwards,
              then ANY_TOKEN
    allowed   a bit mask of mask_words(vocab) words, or nothing

The line of a plain row is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gapless.errors import InternalError
from gapless.sampling import features
from gapless.sampling.features import ANY_TOKEN, BAD_WORD_TOKENS, RECORD_SIZE, mask_words

Ints = NDArray[np.int32]

LINE_HEADER: Final = 8
FOREVER: Final = 2**31 - 1
PLAIN_LINE: Final = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFeatures:
    """What a request asks of its logits. The defaults ask nothing.

    prompt_len    tokens before it in the sequence are the prompt's.
    repetition    > 0; presence and frequency: finite.
    bias          finite values by token id.
    bans          by token id the first position at which it may be sampled: for min_tokens, the ids that would end the
                  request, with prompt_len + min_tokens.
    bad_words     token sequences; the last token is banned where those before it end the sequence so far, prompt
                  included.
    allowed       the only token ids that may be sampled; None: all.
    masked        a mask comes with every step that samples.
    processed     logits processors have arguments of the row.
    num_logprobs  of how many likeliest tokens, besides the sampled one; None: no logprobs.
    """

    prompt_len: int
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict[int, float])
    bans: Mapping[int, int] = field(default_factory=dict[int, int])
    bad_words: Sequence[Sequence[int]] = ()
    allowed: Sequence[int] | Ints | None = None
    masked: bool = False
    processed: bool = False
    num_logprobs: int | None = None

    @property
    def flags(self) -> int:
        """0 for a plain row."""
        asked = {
            features.PENALTIES: (self.repetition, self.presence, self.frequency) != (1.0, 0.0, 0.0),
            features.BIAS: len(self.bias) > 0,
            features.ALLOWED: self.allowed is not None,
            features.BANS: len(self.bans) > 0 or any(len(words) == 1 for words in self.bad_words),
            features.BAD_WORDS: any(len(words) > 1 for words in self.bad_words),
            features.LOGPROBS: self.num_logprobs is not None,
            features.MASKED: self.masked,
            features.PROCESSED: self.processed,
        }
        return sum(flag for flag, wanted in asked.items() if wanted)

    @property
    def counts(self) -> bool:
        """Whether the device has to know every token of the row."""
        return self.flags & (features.PENALTIES | features.BAD_WORDS) != 0

    def line(self, vocab: int) -> Ints:
        """What travels: empty for a plain row.

        Raises InternalError for what the tables can not hold: requests are checked before they come here.
        """
        if not self.flags:
            return PLAIN_LINE
        record = record_of(self.bias, self.bans, self.bad_words, vocab)
        allowed = PLAIN_LINE if self.allowed is None else bit_mask(self.allowed, vocab)
        logprobs = -1 if self.num_logprobs is None else self.num_logprobs
        if logprobs > features.MAX_LOGPROBS:
            raise InternalError(f"at most {features.MAX_LOGPROBS} logprobs, not {logprobs}")
        penalties = np.asarray([self.repetition, self.presence, self.frequency], dtype=np.float32)
        if not (np.isfinite(penalties).all() and penalties[0] > 0):
            raise InternalError(f"penalties must be finite and that for repetition above 0, not {penalties}")
        header = np.asarray([self.flags, self.prompt_len, logprobs], dtype=np.int32)
        sizes = np.asarray([record.size, allowed.size], dtype=np.int32)
        return np.concatenate([header, penalties.view(np.int32), sizes, record, allowed])


def record_of(
    bias: Mapping[int, float], bans: Mapping[int, int], bad_words: Sequence[Sequence[int]], vocab: int
) -> Ints:
    """A row's lists. A bad word of one token is a ban for good. Raises InternalError if they are too many or wrong."""
    bans = {**bans, **{words[0]: FOREVER for words in bad_words if len(words) == 1}}
    sequences = [words for words in bad_words if len(words) != 1]
    if len(bias) > features.MAX_BIAS or len(bans) > features.MAX_BANS or len(sequences) > features.MAX_BAD_WORDS:
        raise InternalError(f"a row can not hold {len(bias)} biases, {len(bans)} bans, {len(sequences)} bad words")
    if any(not 0 < len(words) <= BAD_WORD_TOKENS for words in sequences):
        raise InternalError(f"a bad word has 1 to {BAD_WORD_TOKENS} tokens")
    values = np.asarray(list(bias.values()), dtype=np.float32)
    if not np.isfinite(values).all():
        raise InternalError("a bias must be finite")
    table = np.full((len(sequences), BAD_WORD_TOKENS), ANY_TOKEN, dtype=np.int32)
    for line, words in zip(table, sequences, strict=True):
        line[: len(words)] = words[::-1]
    for ids in (list(bias), list(bans), [token for words in sequences for token in words]):
        _check_ids(np.asarray(ids, dtype=np.int64), vocab)
    return np.concatenate(
        [
            np.asarray([len(bias), len(bans), len(sequences)], dtype=np.int32),
            np.asarray(list(bias), dtype=np.int32),
            values.view(np.int32),
            np.asarray(list(bans), dtype=np.int32),
            np.asarray(list(bans.values()), dtype=np.int32),
            table.reshape(-1),
        ]
    )


def bit_mask(ids: Sequence[int] | Ints, vocab: int) -> Ints:
    """int32[W]: bit t % 32 of word t // 32 is set for each token id t. Raises InternalError for an unknown id."""
    wide = np.asarray(ids, dtype=np.int64)
    _check_ids(wide, vocab)
    bits = np.zeros(mask_words(vocab) * features.WORD_BITS, dtype=np.uint8)
    bits[wide] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32, copy=False)


def longest_line(vocab: int) -> int:
    """The most numbers that a line can have."""
    return LINE_HEADER + RECORD_SIZE + mask_words(vocab)


def pack_lines(lines: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Where each line begins and ends, int32[A + 1], and the lines behind one another, int32[P]."""
    begins = np.zeros(len(lines) + 1, dtype=np.int32)
    np.cumsum([line.size for line in lines], out=begins[1:])
    return begins, np.concatenate([PLAIN_LINE, *lines])


def _check_ids(ids: NDArray[np.int64], vocab: int) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= vocab):
        raise InternalError(f"token ids {ids.min()} to {ids.max()} are outside the vocabulary (0 to {vocab - 1})")
