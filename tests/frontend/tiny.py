"""A tiny engine with a tokenizer for the front ends: the hashing model, with half of its tokens broken UTF-8."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence

import tokenizers
import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.config import EngineConfig
from gapless.device.cpu import CpuDevice
from gapless.engine.build import build_engine
from gapless.engine.core import Engine
from gapless.loading import EngineOptions, Loaded, LoadedEngine, engine_config
from gapless.models.base import Model
from gapless.sampling.torch_sampler import TorchSampler
from gapless.text.chat import ChatTemplate
from gapless.text.detokenize import byte_alphabet
from gapless.text.tokenizer import Tokenizer
from support.hash_model import EOS, VOCAB, HashModel, expected_tokens

TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a{% endif %}"
LETTERS = b"abcdefghijklmnopqrstuvwxyz ,.\n"
PIECES = [b"\xe2", b"\x82", b"\xac", b"\xc3", b"\xa9", b"\xf0", b"\x9f", b"\x98", b"\x80", b"\xff"]
SMALL = EngineConfig(
    device="cpu", lookahead=0, max_rows=8, max_batch_tokens=64, block_size=4, num_blocks=512, max_model_len=128
)


def tiny_inner(vocab_size: int = VOCAB) -> tokenizers.Tokenizer:
    """Byte-level; id 0 is the special token <end>."""
    spelled = {byte: character for character, byte in byte_alphabet().items()}
    tokens = ["<end>", *(spelled[byte] for byte in [*LETTERS, *(piece[0] for piece in PIECES)])]
    vocab = {token: index for index, token in enumerate(tokens)}
    vocab |= {f"a{spelled[97 + extra % 26]}{extra}": index for extra, index in enumerate(range(len(vocab), vocab_size))}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<end>"])
    return inner


def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(tiny_inner(), {"eos_token": "<end>"}, TEMPLATE)


def tiny_engine(model: Model | None = None, **options: object) -> LoadedEngine:
    chosen: EngineOptions = options  # pyright: ignore[reportAssignmentType]
    config = engine_config(SMALL, chosen)
    engine = build_engine(model or HashModel(), config, CpuDevice(), TorchSampler(), torch.float32)
    words = tiny_tokenizer()
    return LoadedEngine(engine, words, ChatTemplate.of(words), "tiny", "cpu", config)


def answer(prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
    """What the hashing model says, computed without an engine."""
    return expected_tokens(prompt, min(128, len(prompt) + max_tokens), [] if ignore_eos else [EOS])


class TripModel(HashModel):
    """Does something once, at the n-th step from now."""

    def __init__(self) -> None:
        super().__init__()
        self.steps_left = -1

    def trip(self) -> None:
        raise RuntimeError("the model tripped")

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        self.steps_left -= 1
        if self.steps_left == 0:
            self.trip()
        return super().forward(tokens_T, kv, batch)


class GatedModel(HashModel):
    """Once it is `gated`, a step waits until it may go on: gate.release(n) lets n of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = False
        self.gate = threading.Semaphore(0)
        self.begun = 0  # steps, since it is gated

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        if self.gated:
            self.begun += 1
            self.gate.acquire()
        return super().forward(tokens_T, kv, batch)


class InterruptModel(TripModel):
    """Presses Ctrl-C."""

    def trip(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)


def engine_of(loaded: Loaded) -> Engine:
    """That runs in this process."""
    assert isinstance(loaded.engine, Engine)
    return loaded.engine


def num_held_blocks(loaded: Loaded) -> int:
    """KV blocks that are not free; exact while the engine is idle."""
    pool = engine_of(loaded)._loop.scheduler.pool  # pyright: ignore[reportPrivateUsage]
    return pool.num_usable - pool.num_free
