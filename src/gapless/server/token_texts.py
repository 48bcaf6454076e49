"""Log probabilities with the texts of their tokens, as chat and completions show them."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence

from msgspec import UNSET

from gapless.outputs import TokenLogprob
from gapless.server.protocol.answers import PromptLogprob, PromptLogprobsBody
from gapless.server.protocol.chat import ChatLogprobs, ContentLogprob, TopLogprob
from gapless.server.protocol.completions import CompletionLogprobs
from gapless.text.tokenizer import Tokenizer

LOWEST = -9999.0
"""What stands for a log probability of minus infinity, which JSON has not."""


class TokenTexts:
    """For one request: what its tokens add to a text, each looked up once."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """b"" without a tokenizer."""
        found = self._bytes.get(token_id)
        if found is None:
            found = b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)
            self._bytes[token_id] = found
        return found

    def text(self, token_id: int) -> str:
        """With U+FFFD for a part of a character."""
        return self.bytes_of(token_id).decode("utf-8", "replace")

    def name(self, token_id: int) -> str:
        """Its text, or bytes:\\x.. for a part of a character, as completions write it; token_id:7 without one."""
        data = self.bytes_of(token_id)
        if not data:
            return f"token_id:{token_id}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def is_special(self, token_id: int) -> bool:
        """Whether it is no part of the text."""
        pattern = None if self._tokenizer is None else self._tokenizer.special_pattern
        return pattern is not None and pattern.fullmatch(self.text(token_id)) is not None

    def chat(self, logprobs: Sequence[TokenLogprob] | None) -> ChatLogprobs | None:
        """Of the tokens that are part of the message."""
        if logprobs is None:
            return None
        shown = [each for each in logprobs if not self.is_special(each.token_id)]
        return ChatLogprobs(
            [
                ContentLogprob(
                    self.text(each.token_id),
                    finite(each.logprob),
                    list(self.bytes_of(each.token_id)),
                    [
                        TopLogprob(self.text(token), finite(logprob), list(self.bytes_of(token)))
                        for token, logprob in each.top
                    ],
                )
                for each in shown
            ]
        )

    def prompt(self, logprobs: Sequence[TokenLogprob | None] | None) -> PromptLogprobsBody:
        """Of a prompt, the token itself among the likeliest."""
        if logprobs is None:
            return UNSET
        return [None if each is None else self._prompt_line(each) for each in logprobs]

    def _prompt_line(self, each: TokenLogprob) -> dict[str, PromptLogprob]:
        line = {str(each.token_id): PromptLogprob(finite(each.logprob), each.rank, self.text(each.token_id))}
        for place, (token, logprob) in enumerate(each.top, start=1):
            line.setdefault(str(token), PromptLogprob(finite(logprob), place, self.text(token)))
        return line


class Offsets:
    """Where in a choice's text its tokens begin, as they come. offset: where the next one does."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.offset = 0

    def add(
        self,
        found: CompletionLogprobs,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob | None],
        top: int,
        *,
        spelled: str = "",
    ) -> None:
        """Put these tokens into `found`, with so many of the likeliest. spelled: the text that they come from, which
        may have special tokens."""
        for token, each in zip(token_ids, logprobs, strict=True):
            found.tokens.append(self._texts.name(token))
            found.token_logprobs.append(None if each is None else finite(each.logprob))
            found.top_logprobs.append(None if each is None else self._top(each, top))
            is_special = self._texts.is_special(token)
            data = b"" if is_special else self._texts.bytes_of(token)
            found.text_offset.append(self.offset + self._torn_before(data))
            if not is_special:
                self.offset += len(self._decoder.decode(data))
            elif spelled.startswith(self._texts.text(token), self.offset):
                self.offset += len(self._texts.text(token))

    def begin_answer(self, offset: int) -> None:
        """The prompt is over, be it within a character."""
        self.offset = offset
        self._decoder.reset()

    def _torn_before(self, data: bytes) -> int:
        """1 if half a character stands before these bytes and they do not go on with it: it is a U+FFFD then."""
        held = self._decoder.getstate()[0]
        if not held or not data:
            return 0
        apart = held.decode("utf-8", "replace") + data.decode("utf-8", "replace")
        return int(apart == (held + data).decode("utf-8", "replace"))

    def _top(self, each: TokenLogprob, top: int) -> dict[str, float]:
        """The likeliest first, the token itself among them or behind. Of two with the same text the likelier."""
        line: dict[str, float] = {}
        for token, logprob in each.top[:top]:
            line.setdefault(self._texts.name(token), finite(logprob))
        line.setdefault(self._texts.name(each.token_id), finite(each.logprob))
        return line


def finite(logprob: float) -> float:
    """As JSON can have it."""
    return logprob if math.isfinite(logprob) else LOWEST
