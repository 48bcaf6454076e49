"""From a model's name to a running engine: what LLM, AsyncLLM, the command line and the benchmarks share."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch import Tensor

from gapless.attention import make_attention
from gapless.collector import Prepared
from gapless.config import Dtype, EngineConfig, ModelConfig
from gapless.device import Device, open_device
from gapless.engine.build import build_engine
from gapless.engine.core import Engine
from gapless.engine.handle import EngineHandle
from gapless.errors import ConfigError, OutOfMemoryError
from gapless.forms import Forms
from gapless.logits_processor import LogitsProcessor
from gapless.models.layers import make_ops
from gapless.models.registry import build_model
from gapless.params import SamplingParams
from gapless.prompts import Prompt, PromptEncoder
from gapless.sampling import make_sampler
from gapless.text.chat import ChatTemplate
from gapless.text.tokenizer import Tokenizer
from gapless.trace.device import traced
from gapless.trace.record import Trace
from gapless.weights.cache import cache_folder
from gapless.weights.hf_config import load_shape
from gapless.weights.names import weight_shapes
from gapless.weights.random import random_weights
from gapless.weights.source import DEMO, ModelSource, open_weights, resolve_model

Load = Literal["auto", "random"]


class EngineOptions(TypedDict, total=False):
    """EngineConfig's fields as keyword arguments."""

    lookahead: int
    max_rows: int
    max_batch_tokens: int | None
    max_model_len: int | None
    block_size: int
    kv_cache_bytes: int | None
    num_blocks: int | None
    memory_fraction: float
    prefix_cache: bool
    graphs: bool
    graph_buckets: tuple[int, ...] | None
    graph_tokens: int | None
    dtype: Dtype | None
    device: str | None
    attention: str | None
    deterministic: bool
    seed: int
    stall_seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """An engine, wherever it runs, with what turns text into its token ids and back; neither for a shape without a
    tokenizer.

    `config` is as it was given, with dtype and device filled in.
    """

    engine: EngineHandle
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    model_name: str
    device_name: str
    config: EngineConfig
    forms: Forms = field(init=False, repr=False)

    def __post_init__(self) -> None:
        model = self.engine.admission.model
        object.__setattr__(self, "forms", Forms(self.tokenizer, model.vocab_size, model.eos_token_ids))

    @property
    def encoder(self) -> PromptEncoder:
        return PromptEncoder(self.tokenizer, self.chat_template)

    def prepare(self, prompt: Prompt, params: SamplingParams | None) -> Prepared:
        """Check a prompt and give each of its continuations an id. Nothing is queued. Raises InvalidRequestError."""
        params = params or SamplingParams()
        encoder, admission = self.encoder, self.engine.admission
        encoded, stops = encoder.encode(prompt), encoder.stops(params)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else admission.model.eos_token_ids)}
        first = admission.make_request(
            encoded.token_ids,
            params,
            priority=encoded.priority,
            cache_salt=encoded.cache_salt,
            stops=stops,
            bad_words=encoder.bad_words(params, ends if params.min_tokens else ()),
            form=self.forms.form_of(params, encoded.token_ids, ends),
        )
        requests = (first, *admission.make_continuations(first))
        return Prepared(requests, encoded.text, encoder.echo(encoded, params))

    def read_vocabulary(self) -> None:
        """What stop strings and forms need of it, a second or so, now and not at the first request that has them: who
        serves many would let all wait for it."""
        if self.tokenizer is not None:
            self.tokenizer.read_vocabulary()
        self.forms.read_vocabulary()

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None and self.chat_template.source is not None


@dataclass(frozen=True, slots=True, eq=False)
class LoadedEngine(Loaded):
    """One whose engine runs in this process."""

    engine: Engine


def engine_config(config: EngineConfig | None, options: EngineOptions) -> EngineConfig:
    """`config` with `options` put over it. Raises ConfigError for a name that is no option."""
    known = [field.name for field in dataclasses.fields(EngineConfig)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"unknown engine option {name!r}; {hint}")
    return dataclasses.replace(config or EngineConfig(), **options)


def load_engine(
    model: str | os.PathLike[str] = DEMO,
    config: EngineConfig | None = None,
    *,
    load: Load = "auto",
    shape: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    trace: Trace | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
) -> LoadedEngine:
    """Load a model and start its engine.

    model      local folder, .gguf file, hub id, or "demo".
    load       "random" fills the model with random numbers instead of its weights.
    shape      with load="random": a named shape or a config.json; `model` is not looked at.
    tokenizer  a folder with a tokenizer.json to use in place of the model's.
    trace      writes down what the engine does when.
    logits_processors  code between the model's scores and the choice of tokens: see logits_processor.py.

    Raises ConfigError, ModelError, OutOfMemoryError.
    """
    config = config or EngineConfig()
    source = _find(model, load, shape)
    device, parts = traced(open_device(config.device), trace)
    try:
        dtype_name: Dtype = config.dtype or ("float32" if device.torch_device.type == "cpu" else "bfloat16")
        dtype: torch.dtype = getattr(torch, dtype_name)
        _check_memory(source, device, dtype)
        limit = source.config.max_position
        built = build_model(
            source.config,
            _tensors(source, load, device.torch_device, dtype, config.seed),
            device=device.torch_device,
            dtype=dtype,
            attention=make_attention(config.attention, device.torch_device, deterministic=config.deterministic),
            max_position=min(config.max_model_len or limit, limit),
            ops=make_ops(device.torch_device, _choices_file(device), deterministic=config.deterministic),
        )
        words = _open_tokenizer(source, tokenizer)
        engine = build_engine(built, config, device, make_sampler(device.torch_device), dtype, parts, logits_processors)
    except BaseException as error:
        device.close()
        if isinstance(error, torch.OutOfMemoryError):
            raise OutOfMemoryError(f"{source.name} does not fit on {device.name}: {error}") from error
        raise
    return LoadedEngine(
        engine=engine,
        tokenizer=words,
        chat_template=ChatTemplate.of(words) if words is not None else None,
        model_name=source.name,
        device_name=device.name,
        config=dataclasses.replace(config, dtype=dtype_name, device=str(device.torch_device)),
    )


def _choices_file(device: Device) -> Path:
    """Where the choice of kernels for this kind of device is kept."""
    name = re.sub(r"[^a-z0-9.]+", "-", f"{device.name} torch {torch.__version__}".lower())
    return cache_folder() / f"linear-{name}.json"


def _check_memory(source: ModelSource, device: Device, dtype: torch.dtype) -> None:
    """Refuse weights that do not fit before any is allocated. Raises OutOfMemoryError."""
    needed = sum(math.prod(shape) for shape in weight_shapes(source.config).values()) * dtype.itemsize
    free, _ = device.memory()
    if needed > free:
        raise OutOfMemoryError(
            f"the weights of {source.name} take {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}; "
            f"{device.name} has {free / 2**30:.1f} GiB free"
        )


def _find(model: str | os.PathLike[str], load: Load, shape: str | os.PathLike[str] | None) -> ModelSource:
    if load not in ("auto", "random"):
        raise ConfigError(f"load must be auto or random, not {load!r}")
    if shape is None:
        return resolve_model(model)
    if load != "random":
        raise ConfigError("a shape has no weights: it goes with load='random'")
    config: ModelConfig = load_shape(shape)
    return ModelSource(config=config, name=os.fspath(shape), folder=None)


def _tensors(
    source: ModelSource, load: Load, device: torch.device, dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, Tensor]]:
    return random_weights(source.config, device, dtype, seed) if load == "random" else open_weights(source)


def _open_tokenizer(source: ModelSource, given: str | os.PathLike[str] | None) -> Tokenizer | None:
    if given is not None:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"the tokenizer must be a folder with a tokenizer.json; {folder} is none")
        return Tokenizer.from_folder(folder)
    return None if source.folder is None else Tokenizer.from_folder(source.folder)
