"""A model's tokenizer: text to token ids and back."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import tokenizers

from gapless.errors import CorruptModelError, InvalidRequestError
from gapless.text.detokenize import (
    BYTE_TOKEN,
    ByteLevelDetokenizer,
    Detokenizer,
    WindowDetokenizer,
    bytes_of_token,
)
from gapless.text.stops import StopCache, StopStrings

_NOT_TEXT = "the text has half of a surrogate pair and is not valid Unicode"
_ROLES = ("bos", "eos", "unk", "pad")


class Tokenizer:
    """tokenizer.json with the names and the chat template that lie beside it. Safe to share between threads.

    vocab_size      token ids are below it; a model's logits may have more columns.
    special_tokens  name -> text, as chat templates ask for them: bos_token, eos_token, unk_token, pad_token.
    special_pattern matches a special token that is spelled out in a text.
    chat_template   the template's source, or None.
    folder          where it was read from, None if it was not.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        special_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
        folder: Path | None = None,
    ) -> None:
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        self._literal: tokenizers.Tokenizer | None = None
        self._token_bytes: dict[int, bytes] = {}
        self.special_tokens = special_tokens or {}
        self.chat_template = chat_template
        self.folder = folder
        added = inner.get_added_tokens_decoder()
        self._special_ids = frozenset(index for index, token in added.items() if token.special)
        special_texts = sorted((token.content for token in added.values() if token.special), key=len, reverse=True)
        self.special_pattern = re.compile("|".join(re.escape(text) for text in special_texts) or r"(?!)")
        self.vocab_size: int = max(inner.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)
        self._stops = StopCache(inner, self._special_ids, self.vocab_size)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja. Raises CorruptModelError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CorruptModelError(f"there is no tokenizer.json in {folder}; other kinds of tokenizers are not read")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise CorruptModelError(f"{path} is not a tokenizer: {error}") from error
        settings = _settings(folder / "tokenizer_config.json")
        return cls(inner, _special_tokens(settings), _chat_template(folder, settings), folder)

    @property
    def bos_token_id(self) -> int | None:
        """The id of the beginning-of-sequence token, or None."""
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end-of-sequence token, or None. A model may stop at more: ModelConfig.eos_token_ids."""
        return self._id_of("eos_token")

    def encode(self, text: str, *, add_special_tokens: bool = True, special_as_text: bool = False) -> list[int]:
        """Token ids of `text`.

        add_special_tokens  put the model's own begin and end tokens around it, as its tokenizer.json says.
        special_as_text     special tokens that are spelled out in `text` are text, not tokens: for what comes from
                            users. Prompts of one's own are read as transformers reads them, tokens included. (Added
                            tokens that the model does not mark as special, like Qwen's <tool_call>, stay tokens.)
        Raises InvalidRequestError for half of a surrogate pair.
        """
        inner = self._as_text() if special_as_text else self._inner
        try:
            return inner.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise InvalidRequestError(_NOT_TEXT) from error

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """encode() of each text, in parallel. Raises InvalidRequestError."""
        try:
            found = self._inner.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise InvalidRequestError(_NOT_TEXT) from error
        return [each.ids for each in found]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids that the vocabulary does not have are left out; broken UTF-8 becomes U+FFFD."""
        try:
            return self._inner.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise InvalidRequestError("a token id is negative or beyond 32 bits") from error

    def stream(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A detokenizer for one continuation: its pieces add up to decode() of all its ids."""
        skipped = self._special_ids if skip_special_tokens else frozenset[int]()
        if isinstance(self._inner.decoder, tokenizers.decoders.ByteLevel):
            return ByteLevelDetokenizer(self._inner, skipped, self._token_bytes)
        return WindowDetokenizer(self._inner, skipped)

    def stop_strings(self, strings: Sequence[str]) -> StopStrings:
        """These stop strings, 1 or more that are not empty, as the engine and stream() need them.

        Made on the caller's thread and kept for the next request that has the same; the first call of all reads the
        vocabulary. Raises InvalidRequestError for half of a surrogate pair.
        """
        try:
            return self._stops.get(tuple(strings))
        except UnicodeEncodeError as error:
            raise InvalidRequestError(_NOT_TEXT) from error

    def read_vocabulary(self) -> None:
        """What stop_strings() needs, some tenths of a second, now and not at its first call."""
        self._stops.read()

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, or None."""
        return self._inner.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, be it a part of a character; of a special one its spelling. b"" for no token."""
        token = self._inner.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            return b""
        if token_id in self._special_ids:
            return token.encode()
        if isinstance(self._inner.decoder, tokenizers.decoders.ByteLevel):
            return bytes_of_token(token)
        if BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(token[3:5])
        once, twice = self.decode([token_id]), self.decode([token_id] * 2)  # some drop a space before all the text
        return twice[len(once) :].encode()

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._inner.token_to_id(text)

    def _as_text(self) -> tokenizers.Tokenizer:
        """A copy of the tokenizer that ignores special tokens: the switch is a state, and threads share `_inner`."""
        if self._literal is None:
            literal = tokenizers.Tokenizer.from_str(self._inner.to_str())
            literal.encode_special_tokens = True
            self._literal = literal
        return self._literal


def _settings(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptModelError(f"{path} is not valid JSON") from error
    if not isinstance(value, dict):
        raise CorruptModelError(f"{path} must hold a JSON object")
    return cast("dict[str, object]", value)


def _special_tokens(settings: dict[str, object]) -> dict[str, str]:
    """A special token is spelled as a text, or as an object with `content`."""
    found: dict[str, str] = {}
    for role in _ROLES:
        value = settings.get(f"{role}_token")
        if isinstance(value, dict):
            value = cast("dict[str, object]", value).get("content")
        if isinstance(value, str):
            found[f"{role}_token"] = value
    return found


def _chat_template(folder: Path, settings: dict[str, object]) -> str | None:
    """chat_template.jinja, else the settings' chat_template: a text, or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CorruptModelError(f"{path} can not be read as UTF-8 text") from error
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {
            each.get("name"): each.get("template")
            for each in cast("list[object]", value)
            if isinstance(each, dict)
            for each in [cast("dict[str, object]", each)]
        }
        value = named.get("default")
    return value if isinstance(value, str) else None
