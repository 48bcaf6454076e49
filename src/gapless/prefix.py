"""What a full KV block holds, as a digest: a chain of SHA-256 over the tokens of each block and the digest before it.

Equal digests mean equal tokens from the beginning of the sequence on, under the same salt. A tenant with a salt of its
own neither finds blocks of others nor is found by them, nor can it tell by the time of an answer what others asked.
"""

from __future__ import annotations

from hashlib import sha256

from gapless.plan import Ints

DIGEST_BYTES = 32
ROOT = b"the salt before the first block:"  # no salt can look like a digest and the tokens behind it


def extend_chain(chain: list[bytes], tokens: Ints, blocks: int, block_size: int, salt: bytes) -> None:
    """Add digests until there is one for each of the first `blocks` blocks of these tokens."""
    if len(chain) >= blocks:
        return
    width = block_size * tokens.itemsize
    data = tokens[len(chain) * block_size : blocks * block_size].tobytes()
    before = chain[-1] if chain else sha256(ROOT + salt).digest()
    for begin in range(0, len(data), width):
        before = sha256(before + data[begin : begin + width]).digest()
        chain.append(before)


def chain_of(tokens: Ints, block_size: int, salt: bytes) -> tuple[bytes, ...]:
    """The digests of all full blocks."""
    chain: list[bytes] = []
    extend_chain(chain, tokens, tokens.size // block_size, block_size, salt)
    return tuple(chain)
