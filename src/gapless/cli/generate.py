"""`gapless generate`: prompts from the command line or from a file of JSON lines."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from gapless.cli import options
from gapless.cli.files import STANDARD, check_files, count_lines, open_lines, open_results
from gapless.cli.sampling import GenerateOptions, with_options
from gapless.cli.setup import load_llm, make_config, warn
from gapless.cli.signals import INTERRUPTED, leave_on_sigint, sigterm_leaves
from gapless.cli.timeline import tracing
from gapless.config import STALL_SECONDS
from gapless.errors import ConfigError

_DEFAULTS = GenerateOptions()


@with_options(GenerateOptions)
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="What to continue or answer.")] = None,
    source: Annotated[str | None, typer.Option("--input", "-i", help="JSON lines with requests; - is stdin.")] = None,
    target: Annotated[
        str | None,
        typer.Option("--output", "-o", help="JSON lines with results; - is stdout (default for --input)."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the answers that --output has, and add those it does not have.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an --output that is not empty.")] = False,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Put each PROMPT through the model's chat template, or not. Default: yes if the model has one. "
            "In a file, `messages` goes through it and `prompt` does not.",
        ),
    ] = None,
    model: options.Model = "demo",
    load: options.Load = "auto",
    shape: options.Shape = None,
    tokenizer: options.Tokenizer = None,
    seed: options.Seed = 0,
    sampling: GenerateOptions = _DEFAULTS,
    lookahead: options.Lookahead = 1,
    max_rows: options.MaxRows = 256,
    max_batch_tokens: options.MaxBatchTokens = None,
    max_model_len: options.MaxModelLen = None,
    kv_cache_memory: options.KVCacheMemory = None,
    num_blocks: options.NumBlocks = None,
    block_size: options.BlockSize = 16,
    prefix_cache: options.PrefixCache = True,
    deterministic: options.Deterministic = False,
    graphs: options.Graphs = True,
    dtype: options.Dtype = None,
    device: options.Device = None,
    stall_seconds: options.StallSeconds = STALL_SECONDS,
    trace: options.Trace = None,
    config: options.Config = None,
) -> None:
    """Answer prompts: gapless generate "Why is the sky blue?"

    A line of --input has `prompt`, `prompt_token_ids` or `messages`, and may have an `id`, `priority`, `cache_salt` and
    any sampling option, under the name that SamplingParams has for it:
    {"id": "a", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}

    A line of --output has index, id, text, token_ids, finish_reason and usage, and stop_reason where a stop string or a
    token of --stop-token-id ended it; or index, id, line and error. The index
    counts the lines of --input from 0, blank ones left out; line, and every message, counts all lines from 1. Lines
    come as they are finished and whole; Ctrl-C and SIGTERM keep them, and the same command with --resume adds the
    others. There a line with an error counts as answered.

    With n above 1, text, token_ids and finish_reason are in a list, outputs. Where they are asked for there are
    logprobs, one for each token, and prompt_logprobs. An answer that could not keep its form has the finish_reason
    error, and its line an error.
    """
    if bool(prompts) == (source is not None):
        raise ConfigError("give either PROMPTs or --input FILE (- is stdin); see gapless generate --help")
    for place, text in enumerate(prompts or [], 1):
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # what Python makes of other bytes
            raise ConfigError(f"prompt {place} is not UTF-8")
    params = sampling.params()
    if source is None and target is None and (params.logprobs, params.prompt_logprobs) != (None, None):
        raise ConfigError("log probabilities go into lines of JSON: add --output FILE (- is stdout)")
    engine = make_config(
        lookahead=lookahead,
        max_rows=max_rows,
        max_batch_tokens=max_batch_tokens,
        max_model_len=max_model_len,
        kv_cache_memory=kv_cache_memory,
        num_blocks=num_blocks,
        block_size=block_size,
        prefix_cache=prefix_cache,
        deterministic=deterministic,
        graphs=graphs,
        dtype=dtype,
        device=device,
        seed=seed,
        stall_seconds=stall_seconds,
    )
    kept = check_files(source, target, resume=resume, overwrite=overwrite)
    if prompts and shape is not None and tokenizer is None:
        raise ConfigError(
            "a shape brings no tokenizer: add --tokenizer FOLDER, or give --input FILE with prompt_token_ids"
        )
    failed = 0
    with (
        tracing(trace, source, target) as recorder,
        load_llm(model, engine, load=load, shape=shape, tokenizer=tokenizer, trace=recorder) as llm,
    ):
        from gapless.cli.batch import BatchRun
        from gapless.cli.prompts import print_answers, to_prompts, write_answers

        if source is not None:
            to_file = target is not None and target != STANDARD
            with open_results(STANDARD if target is None else target, kept) as writer:
                total = count_lines(source) if sys.stderr.isatty() else None
                run = BatchRun(
                    llm,
                    params,
                    writer,
                    open_lines(source),
                    kept=kept,
                    target=target if to_file else None,
                    total=total,
                )
                try:
                    with sigterm_leaves(lambda: f"terminated; {run.progress()}"):
                        run.run()
                except KeyboardInterrupt:
                    leave_on_sigint()
                    warn(f"interrupted; {run.progress()}")
                    raise typer.Exit(INTERRUPTED) from None
                failed = run.errors
        elif target is not None:
            with open_results(target, kept) as writer:
                failed = write_answers(llm, to_prompts(llm, prompts or [], chat), params, writer)
        else:
            failed = print_answers(llm, prompts or [], to_prompts(llm, prompts or [], chat), params)
    raise typer.Exit(1 if failed else 0)
