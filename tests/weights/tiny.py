"""Models small enough to write in every test: config.json, tensors by Hugging Face name, and GGUF files of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from gapless.weights.hf_config import parse_config
from gapless.weights.names import weight_shapes

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 288,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "torch_dtype": "float32",
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
FIXED_SCALES = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}  # where the float16 scales of a block lie


def with_fields(**fields: Any) -> dict[str, Any]:
    """CONFIG with other fields; `...` removes one."""
    return {name: value for name, value in (CONFIG | fields).items() if value is not ...}


def tensors(raw: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.05 for name, shape in weight_shapes(parse_config(raw)).items()
    }


def write_folder(folder: Path, raw: Mapping[str, Any] = CONFIG, seed: int = 0) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    made = tensors(raw, seed)
    save_file(made, str(folder / "model.safetensors"))
    return made


def byte_tokens() -> list[str]:
    """Three special tokens, the 256 bytes of a byte-level vocabulary, and a few merged tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(rest))]
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "he", "ll", "llo", "hello", "Ġhe", "12", "ing"]


MERGES = ["h e", "l l", "ll o", "he llo", "Ġ he", "1 2", "i n", "in g"]


def metadata(raw: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """GGUF metadata: int and float values become uint32 and float32."""
    tokens = [*byte_tokens(), "in"]
    tokens += [f"[PAD{index}]" for index in range(raw["vocab_size"] - len(tokens))]
    kinds = [3] * 3 + [1] * (len(byte_tokens()) - 2)
    return {
        f"{arch}.block_count": raw["num_hidden_layers"],
        f"{arch}.context_length": raw["max_position_embeddings"],
        f"{arch}.embedding_length": raw["hidden_size"],
        f"{arch}.feed_forward_length": raw["intermediate_size"],
        f"{arch}.attention.head_count": raw["num_attention_heads"],
        f"{arch}.attention.head_count_kv": raw["num_key_value_heads"],
        f"{arch}.attention.key_length": raw["head_dim"],
        f"{arch}.attention.layer_norm_rms_epsilon": raw["rms_norm_eps"],
        f"{arch}.rope.freq_base": raw["rope_theta"],
        f"{arch}.rope.dimension_count": raw["head_dim"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds + [5] * (len(tokens) - len(kinds)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


def write_gguf(
    path: Path,
    raw: Mapping[str, Any] = CONFIG,
    arch: str = "llama",
    kind: Kind = Kind.F32,
    extra: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
    without: str = "",
) -> dict[str, torch.Tensor]:
    """A GGUF file of a tiny model with its matrices stored as `kind`; the tensors that it stands for, by HF name.

    `extra` metadata replaces or, with None, removes a key; tensors whose GGUF name contains `without` are left out.
    """
    raw = {**raw, "architectures": [ARCHITECTURES[arch]]}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (metadata(raw, arch) | dict(extra or {})).items():
        add_value(writer, key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA if arch == "llama" else gguf.MODEL_ARCH.QWEN3, 8)
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in tensors(raw).items():
        stored = tensor.numpy()
        heads = {"q_proj": raw["num_attention_heads"], "k_proj": raw["num_key_value_heads"]}
        count = next((heads[part] for part in heads if part in name), None) if arch == "llama" else None
        order = interleaved(stored.shape[0], count) if count else np.arange(stored.shape[0])
        stored = stored[order]
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None
        if without and without in gguf_name:
            continue
        used = kind if stored.ndim == 2 else Kind.F32
        data = quantized(stored, used)
        writer.add_tensor(gguf_name, data, raw_dtype=used)
        values = np.empty_like(stored)
        values[order] = gguf.dequantize(data, used)
        expected[name] = torch.from_numpy(values)
    for name, value in (extra_tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def interleaved(rows: int, heads: int) -> np.ndarray[Any, Any]:
    """Row order of q and k in a llama GGUF: within a head 0, D/2, 1, D/2 + 1, ..."""
    half = rows // heads // 2
    head = [index for pair in range(half) for index in (pair, pair + half)]
    return np.array([start + index for start in range(0, rows, 2 * half) for index in head])


def quantized(values: np.ndarray[Any, Any], kind: Kind) -> np.ndarray[Any, Any]:
    """`values` as `kind`; for those that the package can not quantize, random blocks with a sane scale."""
    if kind not in FIXED_SCALES:
        return gguf.quantize(values, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(values.size)
    blocks = random.integers(0, 256, (values.shape[0], values.shape[1] // block, size), dtype=np.uint8)
    for at in FIXED_SCALES[kind]:
        blocks[..., at : at + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    return blocks.reshape(values.shape[0], -1)
