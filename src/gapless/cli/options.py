"""Options that commands share. Each can also come from GAPLESS_<NAME>, or where there is --config from its file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from gapless.cli.config_file import apply_config_file

_MODEL, _SAMPLING, _ENGINE = "Model", "Sampling", "Engine"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)([KMGT]?)(?:I?B)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str | int) -> int:
    """A count like 4096, 32K, 1.5M or 4G; the units are powers of 1024. Raises typer.BadParameter."""
    found = _SIZE.fullmatch(str(text).strip())
    value = float(found[1]) * _UNITS[found[2].upper()] if found else 0.5
    if found is None or value != int(value):
        raise typer.BadParameter(f"{str(text)!r} is not a size such as 4096, 32K or 4G")
    return int(found[1]) * _UNITS[found[2].upper()] if "." not in found[1] else int(value)


def _option(flags: str, text: str, panel: str | None = None, **more: Any) -> Any:
    """An option whose environment variable follows from its first flag."""
    names = flags.split()
    variable = "GAPLESS_" + names[0].split("/")[0].lstrip("-").replace("-", "_").upper()
    return typer.Option(*names, help=text, rich_help_panel=panel, envvar=variable, show_envvar=False, **more)


def _size(flags: str, text: str, panel: str) -> Any:
    return _option(flags, text, panel, parser=parse_size, metavar="SIZE")


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A YAML file with options of this command, named as here without the dashes in front.",
        envvar="GAPLESS_CONFIG",
        show_envvar=False,
        is_eager=True,
        expose_value=False,
        callback=apply_config_file,
    ),
]

Model = Annotated[
    str, _option("--model -m", "Local folder, .gguf file, hub id, or demo (SmolLM2-135M-Instruct).", _MODEL)
]
Load = Annotated[str, _option("--load", "auto, or random: numbers in place of weights, for measuring.", _MODEL)]
Shape = Annotated[
    str | None,
    _option("--shape", "With --load random: llama-8b, llama-1b, smollm2-135m or a config.json.", _MODEL),
]
Tokenizer = Annotated[str | None, _option("--tokenizer", "Folder with a tokenizer.json to use instead.", _MODEL)]
System = Annotated[str | None, _option("--system", "The system message.", _MODEL)]

Temperature = Annotated[float, _option("--temperature -t", "0 always takes the likeliest token.", _SAMPLING)]
TopK = Annotated[int, _option("--top-k", "Keep the K likeliest tokens; 0 keeps all.", _SAMPLING)]
TopP = Annotated[float, _option("--top-p", "Keep the likeliest tokens that make up this probability.", _SAMPLING)]
MinP = Annotated[float, _option("--min-p", "Drop tokens less likely than this share of the likeliest.", _SAMPLING)]
Seed = Annotated[int, _option("--seed", "The same number gives the same answers; another gives others.", _SAMPLING)]
MaxTokens = Annotated[int, _option("--max-tokens -n", "The most new tokens per answer.", _SAMPLING)]
Stop = Annotated[list[str] | None, _option("--stop", "End an answer before this text. May be repeated.", _SAMPLING)]
StopTokenIds = Annotated[
    list[int] | None, _option("--stop-token-id", "Also stop at this token id. May be repeated.", _SAMPLING)
]
IgnoreEos = Annotated[bool, _option("--ignore-eos", "Do not stop at the model's end token.", _SAMPLING)]

Lookahead = Annotated[
    int, _option("--lookahead", "Steps launched before the oldest is read; 0 is the synchronous engine.", _ENGINE)
]
MaxRows = Annotated[int, _option("--max-rows", "The most requests that run at once.", _ENGINE)]
MaxBatchTokens = Annotated[
    int | None,
    _size("--max-batch-tokens", "The most tokens in one step, as 512 or 8K; 8192 on a GPU, 256 on a CPU.", _ENGINE),
]
MaxModelLen = Annotated[
    int | None, _size("--max-model-len", "Context limit in tokens, as 4096 or 32K (32768).", _ENGINE)
]
KVCacheMemory = Annotated[int | None, _size("--kv-cache-memory", "Bytes for the KV cache, as 2G or 512M.", _ENGINE)]
NumBlocks = Annotated[
    int | None, _size("--num-blocks", "KV blocks, as 500 or 16K, instead of --kv-cache-memory.", _ENGINE)
]
BlockSize = Annotated[int, _option("--block-size", "Tokens in a KV block.", _ENGINE)]
PrefixCache = Annotated[
    bool, _option("--prefix-cache/--no-prefix-cache", "Compute equal beginnings of prompts once.", _ENGINE)
]
Graphs = Annotated[bool, _option("--graphs/--no-graphs", "Capture CUDA graphs of steps.", _ENGINE)]
Dtype = Annotated[str | None, _option("--dtype", "float32, bfloat16 or float16.", _ENGINE)]
Device = Annotated[str | None, _option("--device", "cpu, cuda or cuda:N.", _ENGINE)]
Trace = Annotated[
    Path | None, _option("--trace", "Write what host and device did when: see gapless timeline.", _ENGINE)
]
StallSeconds = Annotated[
    float, _option("--stall-seconds", "Give up when no step ends for so long; 0 waits for ever.", _ENGINE)
]
