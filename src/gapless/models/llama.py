"""The Llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen2 (biases on q, k, v), Qwen3 (norms on q and k).

Letters: T tokens, E chosen tokens, H hidden size, F MLP width, V vocabulary, M = (N + 2K) * D, P positions;
N, K, D and the cache's as in attention/base.py. F2 is 2 F, gate then up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from gapless.attention.base import AttentionBackend, AttentionBatch, HeadRotation, KVSpec, LayerKV
from gapless.config import ModelConfig
from gapless.errors import CorruptModelError
from gapless.kernels.normed import LayerMaps, Normed
from gapless.models.layers import LayerOps, Linear, make_ops
from gapless.models.rope import rope_table


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    input_norm_H: Tensor
    qkv: Linear  # [M, H]: all query heads, all key heads, all value heads
    qk_norm_2D: Tensor | None  # row 0 for queries, row 1 for keys
    output: Linear  # [H, N * D]
    post_norm_H: Tensor
    gate_up: Linear  # [F2, H]
    down: Linear  # [H, F]

    def unpack(self) -> LlamaLayer:
        return replace(
            self,
            qkv=self.qkv.unpack(),
            output=self.output.unpack(),
            gate_up=self.gate_up.unpack(),
            down=self.down.unpack(),
        )

    def pack(self) -> LlamaLayer:
        return replace(
            self,
            qkv=self.qkv.pack(),
            output=self.output.pack(),
            gate_up=self.gate_up.pack(),
            down=self.down.pack(),
        )


@dataclass(slots=True)
class LlamaWeights:
    embed_VH: Tensor
    layers: list[LlamaLayer]
    norm_H: Tensor
    head: Linear  # [V, H]; the embedding itself where they are tied
    tied: bool

    def count(self) -> int:
        """Of the layers' maps."""
        maps = [each for layer in self.layers for each in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        return sum(each.weight_OI.numel() for each in maps)

    def tensors(self) -> Iterator[Tensor]:
        """All of them, in no order."""
        yield self.embed_VH
        yield self.norm_H
        yield self.head.weight_OI
        for layer in self.layers:
            yield from (layer.input_norm_H, layer.post_norm_H)
            if layer.qk_norm_2D is not None:
                yield layer.qk_norm_2D
            for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
                yield from (each for each in linear.weights if each is not None)

    def unpack(self) -> LlamaWeights:
        """What pack() was given: copies where maps are packed, else the same tensors."""
        head = Linear(self.embed_VH) if self.tied else self.head.unpack()
        return replace(self, layers=[layer.unpack() for layer in self.layers], head=head)

    def pack(self) -> None:
        """In place, so that only one layer exists twice at a time."""
        for index, layer in enumerate(self.layers):
            self.layers[index] = layer.pack()
        self.head = self.head.pack()


class LlamaModel:
    """Implements models/base.py `Model`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: LlamaWeights,
        *,
        attention: AttentionBackend,
        ops: LayerOps,
        max_position: int,
    ) -> None:
        self.vocab_size = config.vocab_size
        self.max_position = max_position
        self.eos_token_ids = config.eos_token_ids
        self.kv_spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim)
        self.weights = weights
        self.num_weights = weights.count()
        self.captures_chunks = attention.captures_chunks
        self._config = config
        self._eps = config.rms_norm_eps
        self._scale = config.head_dim**-0.5
        self._rope_PD = rope_table(config.rope, config.head_dim, max_position, weights.embed_VH.device)
        self._attention = attention
        self._ops = ops

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        attention: AttentionBackend,
        max_position: int,
        ops: LayerOps | None = None,
    ) -> LlamaModel:
        """Fill the weights from (Hugging Face name, tensor) pairs in any order, each copied straight to its place.

        Raises CorruptModelError naming a tensor that is missing, unknown, repeated or of a wrong shape.
        """
        weights = _allocate(config, device, dtype)
        _fill(dict(_targets(config, weights)), tensors, tied=config.tie_embeddings)
        weights.pack()
        return cls(config, weights, attention=attention, ops=ops or make_ops(device), max_position=max_position)

    def tensors(self) -> Iterator[Tensor]:
        yield self._rope_PD
        yield from self.weights.tensors()

    def check_weights(self, tensors: Mapping[str, Tensor]) -> None:
        targets = {name: target.shape for name, target in _targets(self._config, self.weights.unpack())}
        for name, tensor in tensors.items():
            if not _is_ignored(name, tied=self._config.tie_embeddings):
                _check(name, tensor, targets.get(name))

    def update_weights(self, tensors: Mapping[str, Tensor]) -> None:
        weights = self.weights.unpack()
        targets = dict(_targets(self._config, weights))
        for name, tensor in tensors.items():
            if not _is_ignored(name, tied=self._config.tie_embeddings):
                targets[name].copy_(tensor)
        if weights.layers[0].qkv is not self.weights.layers[0].qkv:
            weights.pack()
            self.weights = weights

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        layers, ops = self.weights.layers, self._ops
        residual_TH = functional.embedding(tokens_T, self.weights.embed_VH)
        x = ops.rms_norm(residual_TH, layers[0].input_norm_H, self._eps)
        for layer, following, layer_kv in zip(layers, [*layers[1:], None], kv, strict=True):
            qkv_TM = ops.linear(x, *layer.qkv.weights)
            seen_TI = self._attend(qkv_TM, layer, layer_kv, batch)
            x = ops.add_linear(seen_TI, *layer.output.weights, residual_TH, layer.post_norm_H, self._eps)
            gated_TF = ops.gated_linear(x, *layer.gate_up.weights)
            if following is None:
                return residual_TH + ops.linear(Normed(gated_TF), *layer.down.weights)
            x = ops.add_linear(gated_TF, *layer.down.weights, residual_TH, following.input_norm_H, self._eps)
        return residual_TH

    def _attend(self, qkv_TM: Tensor, layer: LlamaLayer, kv: LayerKV, batch: AttentionBatch) -> Tensor:
        rotation = HeadRotation(layer.qk_norm_2D, self._eps, self._rope_PD)
        seen_TND = self._attention.rotate_and_attend(qkv_TM, rotation, kv, batch, self._scale)
        if seen_TND is None:
            q_TND = self._ops.rope_append(qkv_TM, rotation, kv, batch)
            seen_TND = self._attention.attend(q_TND, kv, batch, self._scale)
        return seen_TND.flatten(1)

    def logits(self, hidden_EH: Tensor) -> Tensor:
        x = self._ops.rms_norm(hidden_EH, self.weights.norm_H, self._eps)
        return self._ops.linear(x, *self.weights.head.weights)

    def prepare(
        self,
        batch_sizes: Sequence[int],
        seconds_of: Callable[[Callable[[], object]], float],
        *,
        also: Sequence[int] = (),
    ) -> None:
        layers = self.weights.layers
        maps = LayerMaps(
            plain=[*(layer.qkv.weight_OI for layer in layers), layers[-1].down.weight_OI],  # no norm follows the last
            gated=[layer.gate_up.weight_OI for layer in layers],
            added=[weight for layer in layers for weight in (layer.output.weight_OI, layer.down.weight_OI)],
        )
        self._ops.prepare(self.weights.head.weight_OI, maps, batch_sizes, seconds_of, also=also)


def _allocate(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> LlamaWeights:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def linear(outputs: int, inputs: int, bias: bool) -> Linear:
        return Linear(empty(outputs, inputs), empty(outputs) if bias else None)

    hidden, query_width = config.hidden_size, config.num_heads * config.head_dim
    qkv_width = query_width + 2 * config.num_kv_heads * config.head_dim

    def layer() -> LlamaLayer:
        return LlamaLayer(
            input_norm_H=empty(hidden),
            qkv=linear(qkv_width, hidden, config.qkv_bias),
            qk_norm_2D=empty(2, config.head_dim) if config.qk_norm else None,
            output=linear(hidden, query_width, config.output_bias),
            post_norm_H=empty(hidden),
            gate_up=linear(2 * config.intermediate_size, hidden, config.mlp_bias),
            down=linear(hidden, config.intermediate_size, config.mlp_bias),
        )

    embed_VH = empty(config.vocab_size, hidden)
    return LlamaWeights(
        embed_VH=embed_VH,
        layers=[layer() for _ in range(config.num_layers)],
        norm_H=empty(hidden),
        head=Linear(embed_VH if config.tie_embeddings else empty(config.vocab_size, hidden)),
        tied=config.tie_embeddings,
    )


def _targets(config: ModelConfig, weights: LlamaWeights) -> Iterator[tuple[str, Tensor]]:
    """The place of each tensor under its Hugging Face name: a whole tensor, or a slice of a fused one."""
    yield "model.embed_tokens.weight", weights.embed_VH
    yield "model.norm.weight", weights.norm_H
    if not config.tie_embeddings:
        yield "lm_head.weight", weights.head.weight_OI
    query_width, key_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        attn, mlp = prefix + "self_attn.", prefix + "mlp."
        yield prefix + "input_layernorm.weight", layer.input_norm_H
        yield prefix + "post_attention_layernorm.weight", layer.post_norm_H
        yield from _split(layer.qkv, {attn + "q_proj": query_width, attn + "k_proj": key_width, attn + "v_proj": -1})
        yield from _split(layer.output, {attn + "o_proj": -1})
        yield from _split(layer.gate_up, {mlp + "gate_proj": config.intermediate_size, mlp + "up_proj": -1})
        yield from _split(layer.down, {mlp + "down_proj": -1})
        if layer.qk_norm_2D is not None:
            yield attn + "q_norm.weight", layer.qk_norm_2D[0]
            yield attn + "k_norm.weight", layer.qk_norm_2D[1]


def _split(linear: Linear, widths: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Cut a fused map along its outputs; a width of -1 takes the rest."""
    start = 0
    for name, width in widths.items():
        stop = linear.weight_OI.shape[0] if width < 0 else start + width
        yield name + ".weight", linear.weight_OI[start:stop]
        if linear.bias_O is not None:
            yield name + ".bias", linear.bias_O[start:stop]
        start = stop


def _fill(targets: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]], *, tied: bool) -> None:
    missing = set(targets)
    for name, tensor in tensors:
        if _is_ignored(name, tied=tied):
            continue
        target = targets.get(name)
        _check(name, tensor, None if target is None else target.shape)
        if name not in missing or target is None:
            raise CorruptModelError(f"tensor {name!r} appears twice")
        target.copy_(tensor)
        missing.remove(name)
    if missing:
        first = sorted(missing)[:3]
        raise CorruptModelError(f"missing tensors: {len(missing)}, among them {', '.join(first)}")


def _is_ignored(name: str, *, tied: bool) -> bool:
    """Whether files have it that do not need it."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _check(name: str, tensor: Tensor, shape: torch.Size | None) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_meta:
        raise CorruptModelError(f"tensor {name!r} must be a torch tensor of floating point numbers, with its contents")
    if shape is None:
        raise CorruptModelError(f"tensor {name!r} does not belong to this architecture as config.json describes it")
    if tensor.shape != shape:
        raise CorruptModelError(
            f"tensor {name!r} has shape {list(tensor.shape)}, but config.json calls for {list(shape)}"
        )
