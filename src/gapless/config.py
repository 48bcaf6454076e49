"""Frozen configuration: what a model is (ModelConfig) and how the engine runs it (EngineConfig)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gapless.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
GPU_BATCH_TOKENS = 8192
CPU_BATCH_TOKENS = 256
STALL_SECONDS = 600.0
MAX_STALL_SECONDS = 10**6  # locks take no much longer timeouts
DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. `kind` names the scaling; the factors that a kind does not use are ignored."""

    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position: int = 0  # llama3, yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A dense decoder of the Llama family. Sizes are counts of elements."""

    architecture: str  # as config.json names it, e.g. "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    max_position: int  # the context limit the model was made for
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # bias of the attention output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k (Qwen3)
    dtype: Dtype = "bfloat16"  # of the stored weights
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How the engine runs a model. A None is resolved from the model and the machine.

    lookahead           steps launched before the oldest is read: 0 synchronous, 1 one step ahead (default).
    max_rows            sequences that may run at once.
    max_batch_tokens    most tokens in one step, prefill chunks and decode rows together; None: 8192 on a GPU, 256 on
                        the CPU (a step of them takes about half a second there), or max_rows if that is more.
    max_model_len       context limit in tokens; None: the model's own, as far as the KV cache holds it.
    block_size          tokens in a KV block.
    kv_cache_bytes      memory for the KV cache; None: sized from free memory.
    num_blocks          KV blocks, overriding kv_cache_bytes.
    memory_fraction     share of the memory that is free after the weights for KV cache, activations and graphs; the
                        rest is for libraries.
    prefix_cache        share the KV blocks of equal beginnings, and keep those of ended requests while there is room.
    graphs              capture CUDA graphs of steps (no effect on the CPU device).
    graph_buckets       padded batch sizes to capture of steps that only decode; None: chosen from max_rows.
    graph_tokens        most prompt tokens of a captured step that reads prompts and decodes; None: by the model's size,
                        as far as launching a step without a graph takes longer than the step; below 64: none.
    dtype               of weights, activations and KV cache; None: float32 on CPU, bfloat16 on CUDA.
    device              "cpu", "cuda" or "cuda:1"; None: CUDA when there is one.
    attention           attention backend by name; None: the fastest one that runs there.
    deterministic       batch-invariant mode: a request's tokens and log probabilities are the same to the bit whatever
                        else is in its steps, at any lookahead, chunking or cache hit, on one kind of device. Slower.
    seed                seeds the requests that bring none of their own.
    stall_seconds       with work to do and no step ended for so long, those who wait get EngineDeadError; 0: never.
                        A step that compiles kernels may take minutes.
    """

    lookahead: int = 1
    max_rows: int = 256
    max_batch_tokens: int | None = None
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_bytes: int | None = None
    num_blocks: int | None = None
    memory_fraction: float = 0.95
    prefix_cache: bool = True
    graphs: bool = True
    graph_buckets: tuple[int, ...] | None = None
    graph_tokens: int | None = None
    dtype: Dtype | None = None
    device: str | None = None
    attention: str | None = None
    deterministic: bool = False
    seed: int = 0
    stall_seconds: float = STALL_SECONDS

    def __post_init__(self) -> None:
        _between("lookahead", self.lookahead, 0, 16)
        _between("max_rows", self.max_rows, 1, 65536)
        _between("block_size", self.block_size, 1, 1024)
        _between("seed", self.seed, 0, 2**64 - 1)
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size must be a power of two, not {self.block_size}")
        if self.max_batch_tokens is not None and self.max_batch_tokens < self.max_rows:
            raise ConfigError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_rows ({self.max_rows}): "
                "every running sequence decodes one token a step"
            )
        for name in ("max_model_len", "kv_cache_bytes", "num_blocks"):
            value = getattr(self, name)
            if value is not None:
                _between(name, value, 2, 2**62)
        if not 0.0 < self.memory_fraction <= 1.0:
            raise ConfigError(f"memory_fraction must be above 0 and at most 1, not {self.memory_fraction}")
        if not 0.0 <= self.stall_seconds <= MAX_STALL_SECONDS:
            raise ConfigError(f"stall_seconds must be between 0 and {MAX_STALL_SECONDS}, not {self.stall_seconds}")
        if self.dtype is not None and self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, not {self.dtype!r}")
        if self.graph_tokens is not None:
            _between("graph_tokens", self.graph_tokens, 0, 2**31 - 1)
        for bucket in self.graph_buckets or ():
            _between("graph_buckets", bucket, 1, self.max_rows)

    def token_budget(self, *, on_cpu: bool) -> int:
        """max_batch_tokens, resolved for the device."""
        if self.max_batch_tokens is not None:
            return self.max_batch_tokens
        return max(CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS, self.max_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """EngineConfig's sizes once they are resolved."""

    max_rows: int
    max_batch_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    prefix_cache: bool = True
    max_line_numbers: int = 2**16  # of the features of rows that are taken in one step
    num_processors: int = 0

    @property
    def block_columns(self) -> int:
        return -(-self.max_model_len // self.block_size)

    @property
    def max_block_updates(self) -> int:
        """Most block table entries that one step can change: a block for each decoding row, and the whole prompts of
        the admitted ones, of which all but the last fit in the token budget. Where most of them is shared, fewer are
        admitted in a step than the budget has room for."""
        return 2 * self.max_rows + self.max_batch_tokens // self.block_size + self.block_columns


def _between(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be an integer between {low} and {high}, not {value!r}")
