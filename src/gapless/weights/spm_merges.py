"""The merges that a SentencePiece BPE vocabulary implies: it stores scores, a BPE model wants ranked pairs."""

from __future__ import annotations

from collections.abc import Mapping


def merges_from_scores(pieces: Mapping[str, float], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score of the result first.

    SentencePiece joins the neighbours whose result scores best, so a pair ranks by the score of its result. Pairs
    with one and the same result rank by the ids of their parts, as the converters of transformers do it.
    """
    ranked = sorted(pieces, key=lambda piece: (-pieces[piece], vocab[piece]))
    merges: list[tuple[str, str]] = []
    for piece in ranked:
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        pairs = [(left, right) for left, right in cuts if left in pieces and right in pieces]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges
