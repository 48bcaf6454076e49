"""The bytes of every token, as the grammar library needs them: exactly those that the detokenizer gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
from llguidance import LLTokenizer
from numpy.typing import NDArray

from gapless.errors import InvalidRequestError
from gapless.grammar.build import pack_tokens, table_of
from gapless.text.detokenize import BYTE_TOKEN, bytes_of_token

WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's tokens. V is the model's vocabulary, W = ceil(V / 32); ids that the tokenizer lacks have no bytes.

    table     the library's copy, with V tokens.
    packed    what it was made of, for other processes.
    end_id    the one token that stands for the end in the library; it has no text.
    first_W   uint32, the bits of the tokens that a text may begin with, where the decoder drops a space before it all;
              None where it does not. So what is decoded is what was matched.
    """

    size: int
    table: LLTokenizer
    packed: bytes
    end_id: int
    first_W: NDArray[np.uint32] | None

    @property
    def words(self) -> int:
        return words(self.size)

    @staticmethod
    def of(inner: tokenizers.Tokenizer, size: int, stop_ids: Sequence[int]) -> Vocabulary:
        """Raises InvalidRequestError for a tokenizer whose tokens are no fixed bytes, or that can not end a text."""
        tokens, drops_space = _token_bytes(inner, size)
        special = [i for i, token in inner.get_added_tokens_decoder().items() if token.special and i < size]
        end_id = next((i for i in [*stop_ids, *special] if 0 <= i < size), None)
        if end_id is None:
            raise InvalidRequestError("this model has no end-of-sequence token, so no grammar could end its text")
        tokens[end_id] = b""
        first_W = bits([i for i, token in enumerate(tokens) if not token.startswith(b" ")], size)
        packed = pack_tokens(tokens, end_id, [i for i in special if i != end_id])

        def encode(data: bytes | str) -> list[int]:
            text = data if isinstance(data, str) else data.decode(errors="replace")
            return inner.encode(text, add_special_tokens=False).ids

        return Vocabulary(size, table_of(packed, encode), packed, end_id, first_W if drops_space else None)


def words(size: int) -> int:
    """32-bit words of a mask over `size` tokens."""
    return -(-size // WORD_BITS)


def bits(ids: Sequence[int], size: int) -> NDArray[np.uint32]:
    """uint32[W] with the bits of these ids set."""
    chosen = np.zeros(words(size) * WORD_BITS, dtype=np.bool_)
    chosen[list(ids)] = True
    return np.packbits(chosen, bitorder="little").view("<u4").astype(np.uint32)


def _token_bytes(inner: tokenizers.Tokenizer, size: int) -> tuple[list[bytes], bool]:
    """The bytes of the tokens below `size`, and whether the decoder drops a space before all the text."""
    spelled = [inner.id_to_token(i) for i in range(size)]
    if isinstance(inner.decoder, tokenizers.decoders.ByteLevel):
        return [bytes_of_token(token) for token in spelled], False
    if "ByteFallback" not in repr(inner.decoder):
        raise InvalidRequestError("this model's tokenizer does not tell the bytes of its tokens, as grammars need them")
    special = {i for i, token in inner.get_added_tokens_decoder().items() if token.special}
    tokens = [b"" if token is None else token.encode() for token in spelled]
    plain: list[int] = []
    for i, token in enumerate(spelled):
        if token is not None and BYTE_TOKEN.fullmatch(token):
            tokens[i] = bytes.fromhex(token[3:5])
        elif token is not None and i not in special:
            plain.append(i)
    first = next((i for i in plain if inner.decode([i], skip_special_tokens=False).strip()), None)
    if first is None:
        raise InvalidRequestError("this model's tokenizer has no token with a text")
    before = len(inner.decode([first], skip_special_tokens=False))
    behind = inner.decode_batch([[first, i] for i in plain], skip_special_tokens=False)
    for i, text in zip(plain, behind, strict=True):
        tokens[i] = text[before:].encode()
    spaced = next((i for i in plain if tokens[i].startswith(b" ") and tokens[i].strip()), None)
    drops = spaced is not None and not inner.decode([spaced], skip_special_tokens=False).startswith(" ")
    return tokens, drops
