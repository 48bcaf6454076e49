"""`gapless generate`: prompts from the command line or from a file of JSON lines."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from gapless.cli import options
from gapless.cli.files import STANDARD, check_files, count_lines, open_lines, open_results
from gapless.cli.setup import load_llm, make_config, warn
from gapless.cli.signals import INTERRUPTED, leave_on_sigint, sigterm_leaves
from gapless.cli.timeline import tracing
from gapless.config import STALL_SECONDS
from gapless.errors import ConfigError


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
    temperature: options.Temperature = 1.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = 0,
    max_tokens: options.MaxTokens = 256,
    stop: options.Stop = None,
    stop_token_id: options.StopTokenIds = None,
    ignore_eos: options.IgnoreEos = False,
    lookahead: options.Lookahead = 1,
    max_rows: options.MaxRows = 256,
    max_batch_tokens: options.MaxBatchTokens = None,
    max_model_len: options.MaxModelLen = None,
    kv_cache_memory: options.KVCacheMemory = None,
    num_blocks: options.NumBlocks = None,
    block_size: options.BlockSize = 16,
    prefix_cache: options.PrefixCache = True,
    graphs: options.Graphs = True,
    dtype: options.Dtype = None,
    device: options.Device = None,
    stall_seconds: options.StallSeconds = STALL_SECONDS,
    trace: options.Trace = None,
    config: options.Config = None,
) -> None:
    """Answer prompts: gapless generate "Why is the sky blue?"

    A line of --input has `prompt`, `prompt_token_ids` or `messages`, and may have an `id`, `priority`, `cache_salt` and
    any sampling option:
    {"id": "a", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}

    A line of --output has index, id, text, token_ids, finish_reason and usage, or index, id, line and error. The index
    counts the lines of --input from 0, blank ones left out; line, and every message, counts all lines from 1. Lines
    come as they are finished and whole; Ctrl-C and SIGTERM keep them, and the same command with --resume adds the
    others. There a line with an error counts as answered.
    """
    if bool(prompts) == (source is not None):
        raise ConfigError("give either PROMPTs or --input FILE (- is stdin); see gapless generate --help")
    for place, text in enumerate(prompts or [], 1):
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # what Python makes of other bytes
            raise ConfigError(f"prompt {place} is not UTF-8")
    from gapless.request import SamplingParams

    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        stop_token_ids=tuple(stop_token_id or ()),
        ignore_eos=ignore_eos,
    )
    engine = make_config(
        lookahead=lookahead,
        max_rows=max_rows,
        max_batch_tokens=max_batch_tokens,
        max_model_len=max_model_len,
        kv_cache_memory=kv_cache_memory,
        num_blocks=num_blocks,
        block_size=block_size,
        prefix_cache=prefix_cache,
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
