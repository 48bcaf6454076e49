"""Streaming text: the pieces add up to decoding at once, and no piece shows half of a character."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from gapless.text.detokenize import ByteLevelDetokenizer, WindowDetokenizer, byte_alphabet
from gapless.text.tokenizer import Tokenizer

TEXT = "Hello 👩‍👩‍👧‍👦 and 🎉! 日本語のテキスト, العربية, naïve\n\n  \tcode()  {x: 1}  ü é 한국어 "


def streamed(tokenizer: Tokenizer, ids: Sequence[int], skip: bool = True, step: int = 1) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens=skip)
    pieces = [stream.push(ids[at : at + step]) for at in range(0, len(ids), step)]
    return [*pieces, stream.flush()]


def check(tokenizer: Tokenizer, ids: Sequence[int], skip: bool = True, step: int = 1) -> None:
    assert "".join(streamed(tokenizer, ids, skip, step)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_text_comes_out_whole_and_no_piece_shows_half_of_a_character(
    smollm: Tokenizer, byte_fallback: Tokenizer, step: int
):
    for tokenizer in (smollm, byte_fallback):
        pieces = streamed(tokenizer, tokenizer.encode(TEXT, special_as_text=True), step=step)
        assert "".join(pieces) == tokenizer.decode(tokenizer.encode(TEXT))
        assert not any("\ufffd" in piece for piece in pieces)


def test_text_comes_as_soon_as_it_is_certain(smollm: Tokenizer):
    ids = smollm.encode("the quick brown fox")
    pieces = streamed(smollm, ids)
    assert all(pieces[:-1])
    assert pieces[-1] == ""
    stream = smollm.stream()
    emoji = smollm.encode("🎉")
    assert len(emoji) > 1
    assert [stream.push([each]) for each in emoji] == [""] * (len(emoji) - 1) + ["🎉"]


def test_what_stays_incomplete_comes_at_the_end_as_a_replacement(smollm: Tokenizer, byte_fallback: Tokenizer):
    for tokenizer, count in ((smollm, 1), (byte_fallback, 2)):
        ids = tokenizer.encode("x🎉")[:-1]
        check(tokenizer, ids)
        assert streamed(tokenizer, ids)[-1].endswith("\ufffd" * count)


def test_the_two_detokenizers_are_chosen_by_the_decoder(smollm: Tokenizer, byte_fallback: Tokenizer):
    assert isinstance(smollm.stream(), ByteLevelDetokenizer)
    assert isinstance(byte_fallback.stream(), WindowDetokenizer)


def test_the_byte_alphabet_covers_every_byte_once():
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert byte_alphabet()["Ġ"] == 0x20
    assert byte_alphabet()["Ċ"] == 0x0A


def test_every_token_alone_streams_as_it_decodes(smollm: Tokenizer, byte_fallback: Tokenizer):
    for tokenizer in (smollm, byte_fallback):
        for token_id in range(tokenizer.vocab_size):
            check(tokenizer, [token_id], skip=False)


@pytest.mark.parametrize("skip", [True, False])
def test_random_tokens_stream_as_they_decode(smollm: Tokenizer, skip: bool):
    chance = random.Random(0)
    order = list(range(smollm.vocab_size))
    chance.shuffle(order)
    for at in range(0, len(order), 64):  # every token once, in random company
        check(smollm, order[at : at + 64], skip)
    rare = [0, 1, 2, *range(17, 273), 10**7]  # special tokens, single bytes, an unknown id
    for _ in range(2000):
        check(smollm, chance.choices(rare, k=chance.randint(1, 24)), skip, chance.randint(1, 3))


@pytest.mark.parametrize("skip", [True, False])
def test_random_tokens_with_byte_fallback_stream_as_they_decode(byte_fallback: Tokenizer, skip: bool):
    chance = random.Random(1)
    words = list(range(259, byte_fallback.vocab_size))
    high = list(range(3 + 0x80, 259))
    valid = [byte_fallback.encode(c)[1:] for c in "🎉한ß"]
    for _ in range(3000):
        ids: list[int] = []
        for _ in range(chance.randint(1, 12)):
            part = chance.choice([words, high, [0, 1, 2], [10**7]])
            ids += chance.choice([chance.choice(valid), [chance.choice(part)]])
        check(byte_fallback, ids, skip, chance.randint(1, 3))


def test_ids_beyond_any_vocabulary_give_no_text(smollm: Tokenizer, byte_fallback: Tokenizer):
    for tokenizer in (smollm, byte_fallback):
        assert "".join(streamed(tokenizer, [-1, 2**40])) == ""


def test_the_work_per_token_does_not_grow_with_an_endless_broken_character(smollm: Tokenizer):
    """A run that never becomes valid is given out as it goes instead of being kept."""
    stream = smollm.stream()
    lone = smollm.encode("🎉")[-1]
    assert stream.push([lone] * 1000) == "\ufffd" * 1000
