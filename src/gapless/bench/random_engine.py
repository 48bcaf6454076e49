"""An engine on random weights, and what every figure measured on it must be quoted with."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import default_rng  # np.random is imported at its first use, which can lose a Ctrl-C
from numpy.typing import NDArray

from gapless.config import EngineConfig
from gapless.engine.core import EngineFailure
from gapless.errors import ConfigError
from gapless.loading import load_engine
from gapless.logits_processor import LogitsProcessor
from gapless.outcome import Committed
from gapless.params import SamplingParams
from gapless.request import Request
from gapless.trace.record import Trace
from gapless.weights.hf_config import load_shape


@dataclass(frozen=True, slots=True)
class Generated:
    """Tokens as they came, and whose they are, an array for each step's."""

    request_ids: list[NDArray[np.int64]]
    tokens: list[NDArray[np.int32]]

    def checksum(self) -> int:
        """Of all tokens, request by request."""
        by_request = np.argsort(np.concatenate(self.request_ids), kind="stable")
        return zlib.crc32(np.concatenate(self.tokens)[by_request].tobytes())


class RandomEngine:
    """Built once, run at any lookahead up to that of `config`; None in `config` is filled in.

    The same prompts come again in every run of most measurements, so the prefix cache should be off in `config`.
    """

    def __init__(
        self,
        shape: str,
        config: EngineConfig,
        trace: Trace | None = None,
        *,
        tokenizer: Path | None = None,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        """Raises ConfigError, OutOfMemoryError."""
        begin = time.perf_counter()
        self.loaded = loaded = load_engine(
            config=config, load="random", shape=shape, tokenizer=tokenizer, trace=trace, logits_processors=processors
        )
        self.startup_seconds = time.perf_counter() - begin
        self.model = load_shape(shape)
        self.engine = loaded.engine
        self.config = loaded.config
        self.device_name = loaded.device_name

    @property
    def on_gpu(self) -> bool:
        return self.config.device != "cpu"

    @property
    def torch_device(self) -> torch.device:
        assert self.config.device is not None
        return torch.device(self.config.device)

    @property
    def dtype(self) -> torch.dtype:
        assert self.config.dtype is not None
        return getattr(torch, self.config.dtype)

    @property
    def step_tokens(self) -> int:
        """The most tokens of a step."""
        return self.config.token_budget(on_cpu=not self.on_gpu)

    def traces_kernels(self, wanted: bool | None) -> bool:
        """Whether to: None is wherever there is a GPU. Raises ConfigError if it is wanted without one."""
        if wanted and not self.on_gpu:
            raise ConfigError("a kernel trace needs a GPU")
        return self.on_gpu if wanted is None else wanted

    def requests(self, prompts: Sequence[NDArray[np.int32]], new_tokens: Sequence[int]) -> list[Request]:
        """One greedy request for each prompt, of exactly so many new tokens."""
        return [
            self.engine.admission.make_request(prompt, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
            for prompt, count in zip(prompts, new_tokens, strict=True)
        ]

    def prepare(self, prompts: Sequence[NDArray[np.int32]], params: Sequence[SamplingParams]) -> list[Request]:
        """Requests as callers make them."""
        prepared = [self.loaded.prepare(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        return [request for each in prepared for request in each.requests]

    def random_prompts(self, lengths: Sequence[int], seed: int = 0) -> list[NDArray[np.int32]]:
        rng = default_rng(seed)
        return [rng.integers(0, self.model.vocab_size, length, dtype=np.int32) for length in lengths]

    def generate(self, requests: Sequence[Request]) -> Generated:
        """Run requests that are all there at once to their ends."""
        self.engine.submit(requests)
        unfinished = len(requests)
        request_ids: list[NDArray[np.int64]] = []
        tokens: list[NDArray[np.int32]] = []
        while unfinished:
            record = output_of(self.engine.next_output())
            request_ids.append(record.request_ids)
            tokens.append(record.tokens)
            unfinished -= len(record.finished)
        return Generated(request_ids, tokens)

    def close(self) -> None:
        self.loaded.forms.close()
        self.engine.close()


def output_of(record: Committed | EngineFailure | None) -> Committed:
    """Raises what the engine died of."""
    assert record is not None
    if isinstance(record, EngineFailure):
        raise record.error
    return record
