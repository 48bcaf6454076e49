"""A Hugging Face config.json as a ModelConfig, and the shapes that benchmarks call by name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from gapless.config import Dtype, ModelConfig, RopeConfig
from gapless.errors import ConfigError, CorruptModelError, ModelNotFoundError, UnsupportedModelError
from gapless.weights.fields import Fields, read_json
from gapless.weights.rope_config import parse_rope

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_DTYPES: dict[str, Dtype] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}


def parse_config(raw: Mapping[str, object], where: str = "config.json") -> ModelConfig:
    """What config.json says; `where` names it in errors.

    max_position is the context limit. Two cases change it:
    - A sliding window (Mistral's sliding_window, Qwen's with use_sliding_window) makes attention exact only as far as
      the window reaches, so the limit is cut to the window and full attention gives the model's own answers.
    - yarn reaches factor * original_max_position_embeddings, also where the file still states the original limit.
      linear scaling keeps the stated limit: files disagree on whether it is already scaled.

    Raises UnsupportedModelError for an architecture or a feature that is not implemented, CorruptModelError for a
    field that is missing or makes no sense.
    """
    config = Fields(raw, where)
    architecture = _architecture(config)
    _refuse_unsupported(config)
    hidden_size = config.integer("hidden_size", high=2**20)
    num_layers = config.integer("num_hidden_layers", high=4096)
    num_heads = config.integer("num_attention_heads", high=4096)
    num_kv_heads = config.integer("num_key_value_heads", num_heads, high=4096)
    vocab_size = config.integer("vocab_size", high=2**24)
    if num_heads % num_kv_heads:
        raise config.bad("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    stated_position = config.integer("max_position_embeddings")
    rope = parse_rope(config, stated_position)
    max_position = stated_position
    if rope.kind == "yarn":
        max_position = max(max_position, int(rope.factor * rope.original_max_position))
    window = _sliding_window(config, architecture, num_layers)
    bos = config.ids("bos_token_id", vocab_size)
    bias = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and config.flag("attention_bias")
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(config, architecture, hidden_size, num_heads),
        intermediate_size=config.integer("intermediate_size", high=2**22),
        rms_norm_eps=config.number("rms_norm_eps", high=1.0),
        max_position=min(max_position, window or max_position),
        rope=rope,
        tie_embeddings=config.flag("tie_word_embeddings"),
        qkv_bias=bias or architecture == "Qwen2ForCausalLM",
        output_bias=bias,
        mlp_bias=architecture == "LlamaForCausalLM" and config.flag("mlp_bias"),
        qk_norm=architecture == "Qwen3ForCausalLM",
        dtype=_dtype(config),
        eos_token_ids=config.ids("eos_token_id", vocab_size),
        bos_token_id=bos[0] if bos else None,
    )


def load_config(folder: Path) -> ModelConfig:
    """parse_config of a folder's config.json, with the end-of-sequence ids of its generation_config.json added.

    Raises ModelNotFoundError without a config.json, UnsupportedModelError, CorruptModelError.
    """
    config = parse_config(read_json(folder / "config.json"), str(folder / "config.json"))
    path = folder / "generation_config.json"
    if not path.exists():
        return config
    more = Fields(read_json(path), str(path)).ids("eos_token_id", config.vocab_size)
    return dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + more)))


def load_shape(name_or_path: str | os.PathLike[str]) -> ModelConfig:
    """The config of a name in SHAPES, or of a config.json or the folder that holds one, without any weights.

    Raises ConfigError for what is neither; UnsupportedModelError, CorruptModelError.
    """
    if (shape := SHAPES.get(os.fspath(name_or_path))) is not None:
        return shape
    path = Path(name_or_path).expanduser()
    try:
        return parse_config(read_json(path), str(path)) if path.is_file() else load_config(path)
    except ModelNotFoundError as error:
        names = ", ".join(SHAPES)
        raise ConfigError(f"{name_or_path} is neither a config.json nor the name of a shape ({names})") from error


def _architecture(config: Fields) -> str:
    named = config.items("architectures")
    if not named:
        raise config.missing("architectures")
    if len(named) == 1 and named[0] in SUPPORTED_ARCHITECTURES:
        return str(named[0])
    raise UnsupportedModelError(
        f"{config.where}: the architecture {', '.join(map(str, named))} is not supported; "
        f"supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def _refuse_unsupported(config: Fields) -> None:
    if config.raw.get("quantization_config") is not None:
        raise UnsupportedModelError(f"{config.where}: quantized weights (quantization_config) are not supported")
    activation = config.text("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"{config.where}: hidden_act {activation!r} is not supported; only silu is")


def _head_dim(config: Fields, architecture: str, hidden_size: int, num_heads: int) -> int:
    if config.raw.get("head_dim") is None:
        if architecture == "Qwen3ForCausalLM":
            return 128  # what transformers assumes for this architecture
        if hidden_size % num_heads:
            raise config.bad("hidden_size", f"divisible by num_attention_heads ({num_heads}) as there is no head_dim")
    head_dim = config.integer("head_dim", hidden_size // num_heads, high=4096)
    if head_dim % 2:
        raise CorruptModelError(f"{config.where}: head_dim must be even for rotary embeddings, not {head_dim}")
    return head_dim


def _sliding_window(config: Fields, architecture: str, num_layers: int) -> int | None:
    if architecture == "LlamaForCausalLM" or config.raw.get("sliding_window") is None:
        return None
    if architecture != "MistralForCausalLM":
        if not config.flag("use_sliding_window"):
            return None
        kinds = config.items("layer_types")
        if kinds is not None and "sliding_attention" not in kinds:
            return None
        if kinds is None and config.integer("max_window_layers", 28, low=0) >= num_layers:
            return None
    return config.integer("sliding_window")


def _dtype(config: Fields) -> Dtype:
    name = config.text("dtype") or config.text("torch_dtype") or "float32"
    dtype = _DTYPES.get(name.removeprefix("torch."))
    if dtype is None:
        raise UnsupportedModelError(f"{config.where}: dtype {name!r} is not supported; use one of {', '.join(_DTYPES)}")
    return dtype


_LLAMA_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    rms_norm_eps=1e-5,
    max_position=131072,
    rope=RopeConfig(
        kind="llama3",
        theta=500000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    ),
    eos_token_ids=(128001,),
    bos_token_id=128000,
)

SHAPES: dict[str, ModelConfig] = {
    "llama-8b": _LLAMA_8B,
    "llama-1b": dataclasses.replace(
        _LLAMA_8B,
        hidden_size=2048,
        num_layers=16,
        head_dim=64,
        intermediate_size=8192,
        rope=dataclasses.replace(_LLAMA_8B.rope, factor=32.0),
    ),
    "smollm2-135m": ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=49152,
        hidden_size=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        rms_norm_eps=1e-5,
        max_position=8192,
        rope=RopeConfig(theta=100000.0),
        tie_embeddings=True,
        eos_token_ids=(2,),
        bos_token_id=1,
    ),
}
