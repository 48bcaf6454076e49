"""Options that commands share. Each can also come from GAPLESS_<NAME>, or where there is --config from its file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from gapless.cli.config_file import apply_config_file

_MODEL, _SAMPLING, _ENGINE = "Model", "Sampling", "Engine"
_SCORES, _FORM, _LOGPROBS = "Penalties and bans", "Form of the answer: at most one of these", "Log probabilities"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)([KMGT]?)(?:I?B)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str | int) -> int:
    """A count like 4096, 32K, 1.5M or 4G; the units are powers of 1024. Raises typer.BadParameter."""
    found = _SIZE.fullmatch(str(text).strip())
    value = float(found[1]) * _UNITS[found[2].upper()] if found else 0.5
    if found is None or value != int(value):
        raise typer.BadParameter(f"{str(text)!r} is not a size such as 4096, 32K or 4G")
    return int(found[1]) * _UNITS[found[2].upper()] if "." not in found[1] else int(value)


def make_option(flags: str, text: str, panel: str | None = None, **more: Any) -> Any:
    """An option whose environment variable follows from its first flag."""
    names = flags.split()
    variable = "GAPLESS_" + names[0].split("/")[0].lstrip("-").replace("-", "_").upper()
    return typer.Option(*names, help=text, rich_help_panel=panel, envvar=variable, show_envvar=False, **more)


def make_size(flags: str, text: str, panel: str, **more: Any) -> Any:
    return make_option(flags, text, panel, parser=parse_size, metavar="SIZE", **more)


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
    str, make_option("--model -m", "Local folder, .gguf file, hub id, or demo (SmolLM2-135M-Instruct).", _MODEL)
]
Load = Annotated[str, make_option("--load", "auto, or random: numbers in place of weights, for measuring.", _MODEL)]
Shape = Annotated[
    str | None,
    make_option("--shape", "With --load random: llama-8b, llama-1b, smollm2-135m or a config.json.", _MODEL),
]
Tokenizer = Annotated[str | None, make_option("--tokenizer", "Folder with a tokenizer.json to use instead.", _MODEL)]
System = Annotated[str | None, make_option("--system", "The system message.", _MODEL)]

Temperature = Annotated[float, make_option("--temperature -t", "0 always takes the likeliest token.", _SAMPLING)]
TopK = Annotated[int, make_option("--top-k", "Keep the K likeliest tokens; 0 keeps all.", _SAMPLING)]
TopP = Annotated[float, make_option("--top-p", "Keep the likeliest tokens that make up this probability.", _SAMPLING)]
MinP = Annotated[float, make_option("--min-p", "Drop tokens less likely than this share of the likeliest.", _SAMPLING)]
Seed = Annotated[
    int, make_option("--seed", "Of the random numbers, of which each prompt has its own, by its place.", _SAMPLING)
]
EngineSeed = Annotated[int, make_option("--seed", "Of the random numbers of requests that bring none.", _ENGINE)]
MaxTokens = Annotated[int, make_option("--max-tokens -n", "The most new tokens per answer.", _SAMPLING)]
Stop = Annotated[list[str] | None, make_option("--stop", "End an answer before this text. May be repeated.", _SAMPLING)]
StopTokenIds = Annotated[
    list[int] | None, make_option("--stop-token-id", "Also stop at this token id. May be repeated.", _SAMPLING)
]
IgnoreEos = Annotated[bool, make_option("--ignore-eos", "Do not stop at the model's end token.", _SAMPLING)]

N = Annotated[int, make_option("--n", "Answers to each prompt, which is computed once.", _SAMPLING)]
MinTokens = Annotated[int, make_option("--min-tokens", "Nothing but a limit ends an answer before so many.", _SAMPLING)]
Echo = Annotated[bool, make_option("--echo", "Begin the text with the prompt.", _SAMPLING)]

RepetitionPenalty = Annotated[
    float, make_option("--repetition-penalty", "Above 1: less of what prompt or answer has. Up to 10.", _SCORES)
]
PresencePenalty = Annotated[
    float, make_option("--presence-penalty", "Taken from scores of what the answer has. -2 to 2.", _SCORES)
]
FrequencyPenalty = Annotated[
    float, make_option("--frequency-penalty", "The same for each time that it has it. -2 to 2.", _SCORES)
]
LogitBias = Annotated[
    list[str] | None,
    make_option("--logit-bias", "Added to a token's score, -100 to 100. May be repeated.", _SCORES, metavar="ID=BIAS"),
]
BadWord = Annotated[
    list[str] | None, make_option("--bad-word", "A text that no answer has. May be repeated.", _SCORES, metavar="TEXT")
]

JsonSchema = Annotated[
    str | None, make_option("--json-schema", "JSON that this schema describes.", _FORM, metavar="JSON|@FILE")
]
JsonObject = Annotated[bool, make_option("--json-object", "Any JSON object.", _FORM)]
Regex = Annotated[str | None, make_option("--regex", "A text that matches as a whole.", _FORM, metavar="REGEX")]
Choice = Annotated[
    list[str] | None, make_option("--choice", "One of these texts. To be repeated.", _FORM, metavar="TEXT")
]
Grammar = Annotated[str | None, make_option("--grammar", "A text of this Lark grammar.", _FORM, metavar="LARK|@FILE")]

Logprobs = Annotated[
    int | None, make_option("--logprobs", "Of each token, and of so many likeliest, 0 to 20; in --output.", _LOGPROBS)
]
PromptLogprobs = Annotated[
    int | None, make_option("--prompt-logprobs", "The same of the prompt's tokens; in --output.", _LOGPROBS)
]

Lookahead = Annotated[
    int, make_option("--lookahead", "Steps launched before the oldest is read; 0 is the synchronous engine.", _ENGINE)
]
MaxRows = Annotated[int, make_option("--max-rows", "The most requests that run at once.", _ENGINE)]
MaxBatchTokens = Annotated[
    int | None,
    make_size("--max-batch-tokens", "The most tokens in one step, as 512 or 8K; 8192 on a GPU, 256 on a CPU.", _ENGINE),
]
MaxModelLen = Annotated[
    int | None, make_size("--max-model-len", "Context limit in tokens, as 4096 or 32K (32768).", _ENGINE)
]
KVCacheMemory = Annotated[int | None, make_size("--kv-cache-memory", "Bytes for the KV cache, as 2G or 512M.", _ENGINE)]
NumBlocks = Annotated[
    int | None, make_size("--num-blocks", "KV blocks, as 500 or 16K, instead of --kv-cache-memory.", _ENGINE)
]
BlockSize = Annotated[int, make_option("--block-size", "Tokens in a KV block.", _ENGINE)]
PrefixCache = Annotated[
    bool, make_option("--prefix-cache/--no-prefix-cache", "Compute equal beginnings of prompts once.", _ENGINE)
]
Deterministic = Annotated[
    bool, make_option("--deterministic", "The same bits whatever else is in a batch; slower.", _ENGINE)
]
Graphs = Annotated[bool, make_option("--graphs/--no-graphs", "Capture CUDA graphs of steps.", _ENGINE)]
Dtype = Annotated[str | None, make_option("--dtype", "float32, bfloat16 or float16.", _ENGINE)]
Device = Annotated[str | None, make_option("--device", "cpu, cuda or cuda:N.", _ENGINE)]
Trace = Annotated[
    Path | None, make_option("--trace", "Write what host and device did when: see gapless timeline.", _ENGINE)
]
StallSeconds = Annotated[
    float, make_option("--stall-seconds", "Give up when no step ends for so long; 0 waits for ever.", _ENGINE)
]
