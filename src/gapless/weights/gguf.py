"""A GGUF file as a model folder: converted once, kept in the cache, read like any other folder from then on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from gapless.config import Dtype, ModelConfig
from gapless.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from gapless.weights.cache import build_once, content_key
from gapless.weights.fields import Fields
from gapless.weights.gguf_file import GGUFFile, GGUFTensor
from gapless.weights.gguf_rope import rope_parameters
from gapless.weights.gguf_tokenizer import begin_token_id, build_tokenizer, end_token_ids
from gapless.weights.hf_config import parse_config
from gapless.weights.names import weight_shapes
from gapless.weights.safetensors import SINGLE
from gapless.weights.safetensors_write import write_safetensors

CONVERTER_VERSION = "1"  # change it with anything that changes what a conversion writes
_PART_BYTES = 32 * 2**20

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_PLAIN: dict[Kind, tuple[Dtype, type[np.generic]]] = {
    Kind.F32: ("float32", np.float32),
    Kind.F16: ("float16", np.uint16),
    Kind.BF16: ("bfloat16", np.uint16),
}
_QUANTIZED = (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
_ROPE_FACTORS = "rope_freqs.weight"
_LAYER = re.compile(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)")
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_Rows = np.ndarray[Any, Any]


def convert_gguf(path: Path) -> Path:
    """The model folder made of a GGUF file: config, weights, tokenizer and chat template.

    Quantized tensors become float32, the numbers that they stand for exactly: half the bytes would change greedy
    tokens. F32, F16 and BF16 tensors stay as they are. Memory stays small whatever the size of the model.
    Raises ModelNotFoundError, UnsupportedModelError, CorruptModelError, ModelError when the cache can not be written.
    """
    if not path.is_file():
        raise ModelNotFoundError(f"there is no file {path}")
    key = content_key(path, CONVERTER_VERSION)
    stem = re.sub(r"[^\w.-]", "_", path.stem)[:80]
    return build_once(f"gguf/{stem}-{key}", lambda folder: _convert(path, folder))


def _convert(path: Path, folder: Path) -> None:
    file = GGUFFile(path)
    metadata = Fields(file.metadata, str(path))
    arch = _architecture(metadata)
    tensors = {_hf_name(name, path): tensor for name, tensor in file.tensors.items() if name != _ROPE_FACTORS}
    raw = _config(file, metadata, arch, tensors)
    config = parse_config(raw, str(path))
    layout = _layout(config, tensors, path)
    tokenizer, settings = build_tokenizer(metadata, arch)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise CorruptModelError(f"{path}: more tokens ({tokenizer.get_vocab_size()}) than rows ({config.vocab_size})")
    heads = {".q_proj.": config.num_heads, ".k_proj.": config.num_kv_heads} if arch == "llama" else {}

    def parts(name: str) -> Iterator[_Rows]:
        permuted = next((count for part, count in heads.items() if part in name), None)
        rows = _values(file, tensors[name])
        return rows if permuted is None else iter([_half_split(np.concatenate(list(rows)), permuted)])

    write_safetensors(folder / SINGLE, layout, ((name, parts(name)) for name in layout))
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "generation_config.json", {"eos_token_id": raw["eos_token_id"]})
    _write_json(folder / "config.json", raw)


def _architecture(metadata: Fields) -> str:
    arch = metadata.text("general.architecture")
    if arch is None:
        raise metadata.missing("general.architecture")
    if arch not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise UnsupportedModelError(f"{metadata.where}: the architecture {arch!r} is not supported; known: {known}")
    if metadata.integer(f"{arch}.expert_count", 0, low=0):
        raise UnsupportedModelError(f"{metadata.where}: mixture of experts is not supported")
    return arch


def _config(file: GGUFFile, metadata: Fields, arch: str, tensors: dict[str, GGUFTensor]) -> dict[str, object]:
    """The config.json, written the way transformers 5 does."""
    heads = metadata.integer(f"{arch}.attention.head_count", high=4096)
    hidden = metadata.integer(f"{arch}.embedding_length", high=2**20)
    head_dim = metadata.integer(f"{arch}.attention.key_length", max(hidden // heads, 1))
    others = ("rope.dimension_count", "attention.value_length")
    if any(metadata.integer(f"{arch}.{other}", head_dim) != head_dim for other in others):
        raise UnsupportedModelError(f"{metadata.where}: head sizes of keys, values and rope that differ")
    position = metadata.integer(f"{arch}.context_length")
    position = min(position, metadata.integer(f"{arch}.attention.sliding_window", position))
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise CorruptModelError(f"{metadata.where}: the tensor token_embd.weight is missing")
    factors = file.tensors.get(_ROPE_FACTORS)
    factor_values = None if factors is None else np.concatenate(list(_values(file, factors))).ravel()
    bias = "model.layers.0.self_attn.q_proj.bias" in tensors
    return {
        "architectures": [_ARCHITECTURES[arch]],
        "model_type": arch,
        "dtype": _common_dtype(tensors),
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": metadata.integer(f"{arch}.block_count", high=4096),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": metadata.integer(f"{arch}.feed_forward_length"),
        "hidden_act": "silu",
        "rms_norm_eps": metadata.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": position,
        "rope_parameters": rope_parameters(metadata, arch, head_dim, position, factor_values),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "attention_bias": bias,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in tensors,
        "bos_token_id": begin_token_id(metadata),
        "eos_token_id": end_token_ids(metadata),
    }


def _hf_name(name: str, path: Path) -> str:
    if name in _OUTER:
        return _OUTER[name]
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _INNER:
        raise UnsupportedModelError(f"{path}: the tensor {name} belongs to no supported architecture")
    return f"model.layers.{int(match[1])}.{_INNER[match[2]]}.{match[3]}"


def _layout(
    config: ModelConfig, tensors: dict[str, GGUFTensor], path: Path
) -> dict[str, tuple[Dtype, tuple[int, ...]]]:
    """Stored dtype and shape of each tensor, after checking that the file has exactly what the config asks for."""
    shapes = weight_shapes(config)
    if extra := tensors.keys() - shapes.keys():
        raise UnsupportedModelError(f"{path}: {config.architecture} has no tensor {min(extra)}")
    layout: dict[str, tuple[Dtype, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise CorruptModelError(f"{path}: the tensor {name} is missing")
        if tensor.shape != shape:
            raise CorruptModelError(f"{path}: {tensor.name} has the shape {list(tensor.shape)}, not {list(shape)}")
        if tensor.kind not in _PLAIN and tensor.kind not in _QUANTIZED:
            raise UnsupportedModelError(
                f"{path}: {tensor.name} is stored as {tensor.kind.name}, which is not supported"
            )
        layout[name] = (_dtype(tensor.kind), shape)
    return layout


def _dtype(kind: Kind) -> Dtype:
    return _PLAIN[kind][0] if kind in _PLAIN else "float32"


def _common_dtype(tensors: dict[str, GGUFTensor]) -> Dtype:
    """The dtype that holds most of the weights."""
    bytes_of: dict[Dtype, int] = {}
    for tensor in tensors.values():
        dtype = _dtype(tensor.kind)
        bytes_of[dtype] = bytes_of.get(dtype, 0) + math.prod(tensor.shape)
    return max(bytes_of, key=lambda dtype: bytes_of[dtype])


def _values(file: GGUFFile, tensor: GGUFTensor) -> Iterator[_Rows]:
    """The rows of a tensor in parts, [rows, columns]: as stored (16-bit floats as their bits), or dequantized."""
    columns = tensor.shape[-1]
    rows = math.prod(tensor.shape[:-1])
    step = max(1, _PART_BYTES // (4 * columns))
    for first in range(0, rows, step):
        part = file.rows(tensor, first, min(step, rows - first))
        if tensor.kind in _PLAIN:
            yield part.view(_PLAIN[tensor.kind][1])
        else:
            yield dequantize(part, tensor.kind)


def _half_split(rows: _Rows, heads: int) -> _Rows:
    """Undo the row order of q and k that GGUF uses for llama: pairs (2i, 2i + 1) back to (i, i + head_dim / 2).

    A bias comes as one row and is turned the same way.
    """
    if rows.shape[0] == 1:
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(1, -1)
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")
