"""Stop strings: the engine ends a request where decoding all of its tokens again and again would, and the text is cut
there. The reference does just that."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import takewhile
from types import FrameType
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from gapless.errors import InvalidRequestError
from gapless.text.detokenize import byte_alphabet
from gapless.text.stops import JoinedTexts, StopFilter, WindowTexts, token_texts
from gapless.text.tokenizer import Tokenizer

LETTERS = "ab é中🎉\ufffd"
SPECIAL = "<|special|>"
BEYOND = 10**5  # an id of a model whose logits have more columns than the tokenizer has tokens


def reference(
    tokenizer: Tokenizer, strings: Sequence[str], ids: Sequence[int], least: int = 0
) -> tuple[int, int | None, int]:
    """How many tokens the request gets, which string ends it, and where that begins: the first that is complete at the
    end of a text, and was not in the text before. (One that byte tokens spoil and bring back is not looked for again.)
    """
    before = ""
    candidates = {*np.flatnonzero(tokenizer.stop_strings(strings).candidates).tolist()}
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        known = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False))))
        found = [
            (at, index)
            for index, string in enumerate(strings)
            for at in range(len(text))
            if text.startswith(string, at) and at + len(string) > known
        ]
        if found and count >= least and (not least or ids[count - 1] in candidates):
            at, index = min(found)
            return count, index, at
        before = text
    return len(ids), None, len(before)


def engine(
    tokenizer: Tokenizer, strings: Sequence[str], ids: Sequence[int], least: int = 0
) -> tuple[int, int | None, int]:
    """The same as the engine's thread finds it."""
    stops = tokenizer.stop_strings(strings)
    tokens = np.array(ids, dtype=np.int32)
    for count, token in enumerate(ids, start=1):
        if count >= least and token < tokenizer.vocab_size and stops.candidates[token]:
            index = stops.completes(tokens[:count])
            if index is not None:
                found = stops.locate(tokens[:count])
                assert found is not None
                assert found[0] == index
                return count, index, found[1]
    return len(ids), None, 0


def held_back(text: str, strings: Sequence[str]) -> int:
    """The longest tail that is the beginning of a string."""
    return max(n for string in strings for n in range(len(string)) if text.endswith(string[:n]))


def check(
    tokenizer: Tokenizer, strings: Sequence[str], ids: Sequence[int], step: int = 1, least: int = 0
) -> int | None:
    count, index, at = reference(tokenizer, strings, ids, least)
    text = tokenizer.decode(ids[:count])
    assert engine(tokenizer, strings, ids, least) == (count, index, len(text) - at)
    stops = tokenizer.stop_strings(strings)
    for include in (False, True):
        cut = at + (len(strings[index]) if include and index is not None else 0)
        stream = StopFilter(tokenizer.stream(), stops)
        plain = tokenizer.stream()
        given_out = certain = ""
        begin = 0
        while begin + step < count:
            some = ids[begin : begin + step]
            given_out += stream.push(some)
            certain += plain.push(some)
            assert text[:at].startswith(given_out)
            assert given_out == certain[: len(certain) - held_back(certain, strings)]
            begin += step
        assert given_out + stream.finish(ids[begin:count], len(text) - cut) == text[:cut]
    return index


def slices(text: str) -> st.SearchStrategy[str]:
    """Strings that are in the text."""
    places = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 8))
    return places.map(lambda place: text[place[0] : sum(place)])


@st.composite
def byte_level_cases(draw: st.DrawFn) -> tuple[Tokenizer, list[str], list[int], int, int]:
    """A vocabulary of pieces of bytes, some of them parts of characters; tokens of it; strings that are likely."""
    data = draw(st.text(LETTERS, min_size=4, max_size=16)).encode()
    size = st.integers(1, 5)
    pieces = draw(st.lists(st.tuples(st.integers(0, len(data) - 1), size), min_size=1, max_size=10))
    found = dict.fromkeys(data[at : at + size] for at, size in pieces)
    characters = {byte: character for character, byte in byte_alphabet().items()}
    spelled = ["".join(characters[byte] for byte in piece) for piece in found]
    inner = tokenizers.Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(spelled)}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(SPECIAL, special=True)])
    inner.add_tokens([AddedToken("a b", special=False)])
    tokenizer = Tokenizer(inner)
    ids = draw(st.lists(st.sampled_from([*range(tokenizer.vocab_size), BEYOND]), max_size=24))
    likely = tokenizer.decode(ids) or "a"
    strings = draw(st.lists(slices(likely) | st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=3))
    return tokenizer, strings, ids, draw(st.integers(1, 4)), draw(st.sampled_from([0, 0, 1, 3, 8, 16]))


@settings(deadline=None, max_examples=800)
@given(byte_level_cases())
def test_tokens_of_bytes_end_at_the_string_and_are_cut_there(case: tuple[Tokenizer, list[str], list[int], int, int]):
    check(*case)


def decoded_otherwise(decoder: Any, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with another decoder."""
    inner = tokenizers.Tokenizer.from_str(tokenizer._inner.to_str())  # pyright: ignore[reportPrivateUsage]
    inner.decoder = decoder
    return Tokenizer(inner)


SPACES, BYTES, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
DECODERS = {
    "llama": decoders.Sequence([SPACES, BYTES, FUSE, decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence([SPACES, BYTES, FUSE]),
    "other order": decoders.Sequence([BYTES, SPACES, FUSE]),
    "another letter": decoders.Sequence([SPACES, decoders.Replace("a", "b"), BYTES, FUSE]),
    "metaspace": decoders.Metaspace(),
    "wordpiece": decoders.WordPiece(),
    "suffix": decoders.BPEDecoder("a"),
    "none": None,
}


@pytest.mark.parametrize("name", DECODERS)
def test_tokens_with_byte_fallback_end_at_the_string_and_are_cut_there(byte_fallback: Tokenizer, name: str):
    tokenizer = decoded_otherwise(DECODERS[name], byte_fallback)
    chance = random.Random(name)
    valid = [[3 + byte for byte in character.encode()] for character in "🎉한ß a▁\ufffd"]
    words = list(range(259, tokenizer.vocab_size))
    stopped = 0
    for _ in range(600):
        ids: list[int] = []
        for _ in range(chance.randint(1, 14)):
            one = chance.choice([words, words, [3 + 0xE4, 3 + 0x41, 3 + 0x20], [0, BEYOND]])
            ids += chance.choice([chance.choice(valid), [chance.choice(one)]])
        text = tokenizer.decode(ids) or "a"
        starts = [chance.randrange(len(text)) for _ in range(chance.randint(1, 3))]
        strings = [text[at : at + chance.randint(1, 6)] for at in starts]
        strings += [chance.choice(["the", " a", "é中", "\ufffda", "x"])]
        least = chance.choice([0, 0, len(ids) // 2])
        stopped += check(tokenizer, strings, ids, chance.randint(1, 3), least) is not None
    assert stopped > 300


def test_real_text_ends_at_the_string_and_is_cut_there(smollm: Tokenizer):
    text = (
        "Hello 👩‍👩‍👧‍👦 and 🎉! 日本語のテキスト, naïve\n\n  \tcode()  {x: 1}\nUser: what is it?\n\n### Answer: 한국어 "
    )
    chance = random.Random(2)
    whole = smollm.encode(text)
    for _ in range(300):
        begin = chance.randrange(len(whole))
        ids = whole[begin : begin + 30] + chance.choices(range(smollm.vocab_size), k=4)
        ids.insert(chance.randrange(len(ids)), 2)
        at = chance.randrange(len(text))
        strings = [text[at : at + chance.randint(1, 12)], chance.choice(["\n\n", "User:", "Human:", " ", "e" * 256])]
        check(smollm, strings, ids, chance.randint(1, 3), chance.choice([0, 10]))


def test_the_string_that_begins_first_ends_the_text_and_at_one_place_the_first_in_the_list(smollm: Tokenizer):
    [hello] = smollm.encode(" hello")
    for first, second, index in (("lo", "ell", 1), ("hell", "hello", 0), ("hello", "hell", 0), ("hellx", "ell", 1)):
        assert check(smollm, [first, second], [hello]) == index


def test_a_string_is_not_found_across_the_border_of_the_prompt(smollm: Tokenizer):
    prompt, generated = smollm.encode("one two"), smollm.encode(" three")
    tokens = np.array(prompt + generated, dtype=np.int32)
    stops = smollm.stop_strings(["two three"])
    assert stops.completes(tokens) == 0
    assert stops.completes(tokens[len(prompt) :]) is None


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """A token for each."""
    return [tokenizer.token_to_id(letter) or 0 for letter in text]


@pytest.mark.parametrize(
    ("text", "strings", "least", "wanted"),
    [
        ("xabyab", ["ab"], 3, "x"),  # it is complete with the token of the border
        ("xabyab", ["ab"], 4, "xaby"),
        ("xabyab", ["ab"], 2, "x"),
        ("xaby", ["ab"], 4, "xaby"),  # it is all before it
        ("xabcy", ["abc"], 3, "x"),  # it straddles the border
        ("aaa", ["aa"], 3, "a"),  # what begins in one that does not count
        ("aab", ["aa", "aab"], 3, ""),
        ("abcd", ["ab", "cd"], 4, "ab"),
        ("abd", ["ab", "cd"], 3, "abd"),  # a candidate that ends nothing, behind one that does not count
        ("xyabc", ["bc", "xyabc", "b"], 5, ""),
    ],
)
def test_what_was_complete_before_min_tokens_is_text(
    smollm: Tokenizer, text: str, strings: list[str], least: int, wanted: str
):
    ids = letters(smollm, text)
    for step in (1, 2, 3):
        check(smollm, strings, ids, step, least)
    count, index, back = engine(smollm, strings, ids, least)
    assert text[: count - back] == (wanted if index is not None else text)
    assert (index is None) == (wanted == text)


def test_half_of_a_character_counts_as_what_decoding_shows(smollm: Tokenizer):
    emoji = smollm.encode("🎉")
    assert check(smollm, ["🎉"], emoji) == 0
    assert check(smollm, ["\ufffd"], emoji) == 0
    assert reference(smollm, ["\ufffd"], emoji)[0] == 1
    assert check(smollm, ["x"], emoji[:-1]) is None


def test_a_character_that_began_before_what_is_read_again_is_not_half_of_one(smollm: Tokenizer):
    characters = {byte: character for character, byte in byte_alphabet().items()}
    party = [smollm.token_to_id(characters[byte]) or 0 for byte in "🎉".encode()]
    letter = smollm.token_to_id("b") or 0
    assert smollm.decode([*party, letter]) == "🎉b"
    for tokenizer in (smollm, decoded_otherwise(decoders.Sequence([decoders.ByteLevel()]), smollm)):
        for string in ("\ufffdb", "\ufffdbb", "\ufffd\ufffdb"):
            assert check(tokenizer, [string], party + [letter] * 16) is None


def test_a_run_of_byte_tokens_is_spoiled_as_a_whole(byte_fallback: Tokenizer):
    before = [byte_fallback.token_to_id(letter) or 0 for letter in "sab"]
    ids = [*before, *[3 + 0x41] * 20, 3 + 0xE4]
    assert check(byte_fallback, ["sab\ufffd"], ids) == 0
    assert reference(byte_fallback, ["sab\ufffd"], ids)[0] == len(ids)


def test_a_byte_token_ends_the_request_at_once_though_the_stream_waits_for_the_end_of_its_run(
    byte_fallback: Tokenizer,
):
    ids = [byte_fallback.token_to_id("a") or 0, 3 + 0x0A, 3 + 0x41]
    assert engine(byte_fallback, ["\n"], ids) == (2, 0, 1)
    check(byte_fallback, ["\n"], ids)


def test_only_tokens_that_can_be_the_last_of_a_string_are_candidates(smollm: Tokenizer):
    for strings in (["\n\n"], ["User:", "é"], ["Observation: "], ["🎉", "x" * 20 + "ing"], ["e"], [" the "]):
        found = smollm.stop_strings(strings).candidates
        wanted = [string.encode() for string in strings]
        ends = tuple({each[at:] for each in wanted for at in range(len(each))})
        expected = np.zeros(smollm.vocab_size, dtype=np.bool_)
        stream: Any = smollm.stream()
        for token in range(17, smollm.vocab_size):  # the first 17 are special
            data = stream._bytes_of(token)
            expected[token] = data.startswith(ends) or any(each in data for each in wanted)
        assert np.array_equal(found, expected)


def test_tokens_are_joined_where_the_decoder_is_known_and_else_decoded_again(
    smollm: Tokenizer, byte_fallback: Tokenizer
):
    def kind(tokenizer: Tokenizer) -> type:
        return type(token_texts(tokenizer._inner, frozenset(), 300))  # pyright: ignore[reportPrivateUsage]

    assert kind(smollm) is JoinedTexts
    two_spaces = decoders.Sequence([SPACES, BYTES, FUSE, decoders.Strip(" ", 2, 0)])
    for name, decoder in {**DECODERS, "two spaces": two_spaces}.items():
        expected = JoinedTexts if name in ("llama", "gemma") else WindowTexts
        assert kind(decoded_otherwise(decoder, byte_fallback)) is expected


def test_stop_strings_are_made_once_for_all_threads_and_can_not_be_written_to(smollm: Tokenizer):
    made: list[object] = []
    threads = [threading.Thread(target=lambda: made.append(smollm.stop_strings(["once"]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, made))) == 1
    assert smollm.stop_strings(("once",)) is made[0]
    with pytest.raises(ValueError, match="read-only"):
        smollm.stop_strings(["once"]).candidates[0] = True


def test_the_cache_keeps_the_latest(byte_fallback: Tokenizer):
    first, second = byte_fallback.stop_strings(["first"]), byte_fallback.stop_strings(["second"])
    for number in range(63):
        byte_fallback.stop_strings([f"other {number}"])
        assert byte_fallback.stop_strings(["first"]) is first
    assert byte_fallback.stop_strings(["second"]) is not second


def test_half_of_a_surrogate_pair_is_refused(smollm: Tokenizer):
    with pytest.raises(InvalidRequestError, match="surrogate"):
        smollm.stop_strings(["a", "\ud800"])


def lines_run(call: Callable[[], object]) -> int:
    """How many lines of Python a call takes."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("strings", [["a" * 255 + "b"], ["a" * n + "b" for n in range(1, 17)], ["ab" * 100 + "c"]])
def test_the_filter_takes_linear_time_on_near_matches(smollm: Tokenizer, strings: list[str]):
    ids = smollm.encode(strings[0][:-1].replace("b", "a")) * 40

    def run(ids: list[int]) -> None:
        stream = StopFilter(smollm.stream(), smollm.stop_strings(strings))
        for token in ids:
            stream.push([token])
        stream.finish([], 0)

    run(ids[:1])
    half, whole = (lines_run(lambda n=n: run(ids[:n])) for n in (len(ids) // 2, len(ids)))
    assert whole < 2.1 * half
    characters = len(smollm.decode(ids))
    assert whole < 20 * (characters + len(ids))


def test_the_exact_check_reads_only_the_end_of_the_tokens(smollm: Tokenizer, byte_fallback: Tokenizer):
    for tokenizer in (smollm, byte_fallback, decoded_otherwise(DECODERS["metaspace"], byte_fallback)):
        token = tokenizer.token_to_id("a")
        endless = np.broadcast_to(np.array(token, dtype=np.int32), 2**60)
        assert tokenizer.stop_strings(["b" * 256 + "a"]).completes(endless) is None
        assert tokenizer.stop_strings(["b", "a" * 256]).completes(endless) == 1
