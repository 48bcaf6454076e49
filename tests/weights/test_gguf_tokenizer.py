"""Tokenizers out of GGUF metadata, against transformers and against a SentencePiece merge written out plainly."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from gapless.errors import CorruptModelError, UnsupportedModelError
from gapless.weights.fields import Fields
from gapless.weights.gguf_file import GGUFFile
from gapless.weights.gguf_tokenizer import build_tokenizer
from weights.tiny import CONFIG, metadata

TEXTS = [
    "Hello, world! It's a test; don't worry -- we'll see.",
    "  two  spaces\n\n\tand\ttabs \r\n end ",
    "naïve café, 日本語のテキスト, 한국어, العربية, 🎉👩‍👩‍👧‍👦!",
    "def f(x):\n    return x ** 2  # squared\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
]


def build(changes: dict[str, Any], arch: str = "llama") -> Tokenizer:
    values = {key: value for key, value in (metadata(CONFIG, arch) | changes).items() if value is not None}
    return build_tokenizer(Fields(values, "m.gguf"), arch)[0]


def cut(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words that a text is cut into before merging, as text."""
    assert tokenizer.pre_tokenizer is not None
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    return [tokenizer.decoder.decode([word]) for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]


@pytest.fixture(scope="module")
def smollm(smollm_gguf: Path) -> tuple[Tokenizer, Any]:
    """Ours and what transformers makes of the same metadata."""
    from transformers.integrations.ggml import convert_gguf_tokenizer

    values = GGUFFile(smollm_gguf).metadata
    prefix = "tokenizer.ggml."
    theirs: dict[str, Any] = {key.removeprefix(prefix): value for key, value in values.items() if prefix in key}
    theirs |= {"tokenizer_type": theirs.pop("model"), "unk_token_id": 0, "pad_token_id": 2}
    oracle, _ = convert_gguf_tokenizer("llama", theirs)
    return build_tokenizer(Fields(values, "smollm"), "llama")[0], oracle


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_ids_are_those_of_transformers_on_text_without_digits(smollm: tuple[Tokenizer, Any], text: str):
    ours, theirs = smollm
    ids = ours.encode(text).ids
    assert ids == theirs.encode(text).ids
    assert ours.decode(ids, skip_special_tokens=False) == text


def test_smollm2_digits_are_split_one_by_one_where_transformers_drops_that(smollm: tuple[Tokenizer, Any]):
    ours, theirs = smollm
    tokens = ours.encode("in 2024:  1337").tokens
    assert tokens == ["in", "Ġ", *"2024", ":", "ĠĠ", *"1337"]
    assert theirs.encode("in 2024:  1337").tokens == ["in", "Ġ", *"2024", ":", "Ġ", "Ġ", *"1337"]


def test_smollm2_has_its_special_tokens_and_size(smollm: tuple[Tokenizer, Any]):
    ours, _ = smollm
    assert ours.get_vocab_size() == 49152
    assert ours.token_to_id("<|im_end|>") == 2
    assert sum(token.special for token in ours.get_added_tokens_decoder().values()) == 17


def test_each_pre_tokenizer_cuts_in_its_own_way():
    text = "We'LL pay  1234.5€\n\nin 3 days"
    cuts = {pre: cut(build({"tokenizer.ggml.pre": pre}), text) for pre in ("smollm", "gpt-2", "llama-bpe", "qwen2")}
    assert cuts["gpt-2"] == ["We", "'", "LL", " pay", " ", " 1234", ".", "5", "€", "\n", "\n", "in", " 3", " days"]
    smollm = ["We", "'", "LL", " pay", "  ", "1", "2", "3", "4", ".", "5", "€", "\n", "\n", "in", " ", "3", " days"]
    assert cuts["smollm"] == smollm
    assert cuts["llama-bpe"] == ["We", "'LL", " pay", " ", " ", "123", "4", ".", "5", "€\n\n", "in", " ", "3", " days"]
    assert cuts["qwen2"] == ["We", "'LL", " pay", " ", " ", *"1234", ".", "5", "€\n\n", "in", " ", "3", " days"]


def test_qwen_composes_characters_and_the_others_do_not():
    assert build({"tokenizer.ggml.pre": "qwen2"}).encode("e\u0301").ids == build({}).encode("\u00e9").ids
    assert build({}).encode("e\u0301").ids != build({}).encode("\u00e9").ids


def test_llama_3_takes_whole_words_of_the_vocabulary_before_it_merges():
    without_merges = {"tokenizer.ggml.merges": ["h e"], "tokenizer.ggml.pre": "llama-bpe"}
    tokenizer = build({**without_merges, "tokenizer.ggml.add_bos_token": False})
    assert tokenizer.encode("hello").tokens == ["hello"]
    assert build({**without_merges, "tokenizer.ggml.pre": "gpt-2"}).encode("hello").tokens == ["he", "l", "l", "o"]


def test_begin_and_end_tokens_are_added_as_the_metadata_says():
    assert build({}).encode("in").ids == [266]
    assert build({"tokenizer.ggml.add_bos_token": True}).encode("in").ids == [1, 266]
    assert build({"tokenizer.ggml.pre": "llama-bpe"}).encode("in").ids == [1, 266]
    both = build({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True})
    assert both.encode("in").ids == [1, 266, 2]
    assert both.encode("in", add_special_tokens=False).ids == [266]


def test_control_tokens_are_special_and_user_defined_ones_are_only_added():
    kinds = metadata(CONFIG, "llama")["tokenizer.ggml.token_type"]
    tokenizer = build({"tokenizer.ggml.token_type": [*kinds[:1], 4, *kinds[2:]]})
    ids = tokenizer.encode("x<|im_start|>y<|im_end|>").ids
    assert 1 in ids
    assert 2 in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "x<|im_start|>y"


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"tokenizer.ggml.model": "bert"}, UnsupportedModelError, "bert"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, UnsupportedModelError, "deepseek-llm.*qwen2"),
        ({"tokenizer.ggml.merges": ["nospace"]}, CorruptModelError, "merges"),
        ({"tokenizer.ggml.merges": ["x zz"]}, CorruptModelError, "merge 'x' 'zz'"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, CorruptModelError, "token_type"),
        ({"tokenizer.ggml.tokens": ["a", 3]}, CorruptModelError, "tokens"),
        ({"tokenizer.ggml.tokens": ["h", "e", "he", "h"], "tokenizer.ggml.token_type": None,
          "tokenizer.ggml.merges": ["h e"]}, CorruptModelError, "twice"),
    ],
)  # fmt: skip
def test_tokenizers_that_can_not_be_rebuilt_are_refused(changes: dict[str, Any], error: type[Exception], named: str):
    with pytest.raises(error, match=named):
        build(changes)


PIECES = ["▁", "▁t", "he", "▁the", "in", "ing", "▁a", "th", "er", "▁in", "re", "▁w", "an", "and", "▁and", "aa", "aaa"]
LETTERS = [*sorted(set("".join(PIECES)) - {"▁"}), ",", "é"]


def sentencepiece() -> dict[str, Any]:
    """A small SentencePiece vocabulary, scores as the real ones have them: minus the rank."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, *LETTERS]
    special = 3 + 256
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * special + [-float(rank) for rank in range(len(tokens) - special)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - special),
        "tokenizer.ggml.unknown_token_id": 0,
    }


def merged_plainly(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece's own rule: always join the neighbours whose result scores best, the leftmost first."""
    vocab = {token: index for index, token in enumerate(tokens)}
    pieces = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        joined = [(a + b, at) for at, (a, b) in enumerate(itertools.pairwise(pieces))]
        known = [(-scores[vocab[piece]], at) for piece, at in joined if piece in vocab]
        if not known:
            break
        _, at = min(known)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    spelled = ([piece] if piece in vocab else [f"<0x{byte:02X}>" for byte in piece.encode()] for piece in pieces)
    return [vocab[token] for group in spelled for token in group]


def test_sentencepiece_vocabularies_merge_by_score_and_fall_back_to_bytes():
    values = sentencepiece()
    tokenizer = build(values)
    chance = random.Random(0)
    texts = ["the thing and the other", "aaaaa", "日本 é 🎉", " leading and trailing ", ""]
    texts += ["".join(chance.choices([*LETTERS, " ", "日", "x"], k=chance.randint(1, 40))) for _ in range(300)]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == merged_plainly(text, values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"]), text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("the").ids == [1, *tokenizer.encode("the", add_special_tokens=False).ids]


def test_sentencepiece_without_a_space_in_front_keeps_the_text_as_it_is():
    tokenizer = build({**sentencepiece(), "tokenizer.ggml.add_space_prefix": False})
    assert tokenizer.encode("the", add_special_tokens=False).tokens == ["t", "he"]
    ids = tokenizer.encode(" the", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == " the"


def test_sentencepiece_vocabularies_that_say_too_little_are_refused():
    values = sentencepiece()
    with pytest.raises(CorruptModelError, match="scores"):
        build({**values, "tokenizer.ggml.scores": None})
    missing = ["gone" if token == "<0x41>" else token for token in values["tokenizer.ggml.tokens"]]
    with pytest.raises(UnsupportedModelError, match="256 bytes"):
        build({**values, "tokenizer.ggml.tokens": missing})
    with pytest.raises(UnsupportedModelError, match="do not merge"):
        build({**values, "tokenizer.ggml.token_type": [4] * len(missing)})
