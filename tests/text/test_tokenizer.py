"""Text to token ids and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gapless.errors import CorruptModelError, InvalidRequestError
from gapless.text.tokenizer import Tokenizer

TEXT = "Hello, wörld! 🎉 日本"


def test_text_survives_a_round_trip(smollm: Tokenizer):
    assert smollm.decode(smollm.encode(TEXT)) == TEXT
    assert smollm.encode_batch([TEXT, "", "x"]) == [smollm.encode(TEXT), [], smollm.encode("x")]


def test_ids_of_special_tokens_and_the_size_of_the_vocabulary_are_known(smollm: Tokenizer):
    assert (smollm.vocab_size, smollm.bos_token_id, smollm.eos_token_id) == (49152, 1, 2)
    assert smollm.special_tokens["unk_token"] == "<|endoftext|>"
    assert smollm.token_to_id("<|im_start|>") == 1
    assert smollm.token_to_id("no such token") is None


def test_special_tokens_in_text_are_tokens_or_text_as_asked(smollm: Tokenizer):
    text = "a<|im_end|>b"
    assert 2 in smollm.encode(text)
    as_text = smollm.encode(text, special_as_text=True)
    assert 2 not in as_text
    assert smollm.decode(as_text) == text
    assert 2 in smollm.encode(text), "the switch is not a state that others see"


def test_special_tokens_are_left_out_of_decoded_text_unless_asked_for(smollm: Tokenizer):
    ids = [1, *smollm.encode("hi"), 2]
    assert smollm.decode(ids) == "hi"
    assert smollm.decode(ids, skip_special_tokens=False) == "<|im_start|>hi<|im_end|>"


def test_ids_beyond_the_vocabulary_decode_to_nothing_and_impossible_ones_are_refused(smollm: Tokenizer):
    assert smollm.decode([10**6]) == ""
    for impossible in (-1, 2**40):
        with pytest.raises(InvalidRequestError, match="token id"):
            smollm.decode([impossible])


def test_half_of_a_surrogate_pair_is_refused(smollm: Tokenizer):
    with pytest.raises(InvalidRequestError, match="surrogate"):
        smollm.encode("\ud800")
    with pytest.raises(InvalidRequestError, match="surrogate"):
        smollm.encode_batch(["\ud800"])


def test_a_truncation_or_padding_in_the_file_changes_nothing(smollm_folder: Path, tmp_path: Path):
    raw = json.loads((smollm_folder / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 2, "pad_type_id": 0, "pad_token": "<|im_end|>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert len(Tokenizer.from_folder(tmp_path).encode("one two three")) == 3


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(CorruptModelError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    for text in ("", "{}", '{"model": 1}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(CorruptModelError, match=r"tokenizer\.json is not a tokenizer"):
            Tokenizer.from_folder(tmp_path)


def test_broken_settings_are_named(smollm_folder: Path, tmp_path: Path):
    shutil.copy(smollm_folder / "tokenizer.json", tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(CorruptModelError, match=r"tokenizer_config\.json"):
            Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("settings", "file", "expected"),
    [
        ({}, None, None),
        ({"chat_template": "one"}, None, "one"),
        ({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}, None, "d"),
        ({"chat_template": "one"}, "from the file", "from the file"),
    ],
)
def test_the_chat_template_is_found_where_models_keep_it(
    smollm_folder: Path, tmp_path: Path, settings: dict[str, object], file: str | None, expected: str | None
):
    shutil.copy(smollm_folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": {"content": "<|im_end|>"}}))
    if file:
        (tmp_path / "chat_template.jinja").write_text(file)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.chat_template == expected
    assert tokenizer.eos_token_id == 2
    assert tokenizer.bos_token_id is None


def test_the_bytes_of_tokens_add_up_to_their_text(smollm: Tokenizer, byte_fallback: Tokenizer):
    text = "Hello 🎉 naïve  日本\n"
    assert b"".join(map(smollm.token_bytes, smollm.encode(text))).decode() == text
    assert smollm.token_bytes(2) == b"<|im_end|>"
    assert smollm.token_bytes(10**6) == smollm.token_bytes(-1) == b""
    for word in ("▁", "a", "<0xE4>"):
        token = byte_fallback.token_to_id(word)
        assert token is not None
        assert byte_fallback.token_bytes(token) == {"▁": b" ", "a": b"a", "<0xE4>": b"\xe4"}[word]
