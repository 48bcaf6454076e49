"""Between text and tokens: tokenizers, incremental detokenisation, chat templates."""

from gapless.text.chat import ChatTemplate
from gapless.text.detokenize import Detokenizer
from gapless.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "Tokenizer"]
