"""`gapless run-batch`: OpenAI's batch files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gapless.cli import options, server_options
from gapless.cli.setup import make_config, say, warn
from gapless.cli.signals import INTERRUPTED, leave_on_sigint, sigterm_leaves
from gapless.cli.targets import check_target
from gapless.config import STALL_SECONDS
from gapless.errors import ConfigError, InputFileError


def run_batch(
    source: Annotated[Path, typer.Option("--input", "-i", help="The batch file: custom_id, method, url, body a line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where answers go, a line each.")],
    errors: Annotated[
        Path | None,
        typer.Option("--errors", help="Where errors go. Default: the output's name with .errors behind it."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the answers that there are, and add the others.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an --output that is not empty.")] = False,
    model: options.Model = "demo",
    served_model_name: server_options.ModelName = None,
    load: options.Load = "auto",
    shape: options.Shape = None,
    tokenizer: options.Tokenizer = None,
    seed: options.EngineSeed = 0,
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
    config: options.Config = None,
) -> None:
    """Answer a batch file, as OpenAI's batch API takes it:

    gapless run-batch -i requests.jsonl -o answers.jsonl

    A line of it: {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}

    Each answer is written as soon as it is there. After Ctrl-C or a kill the same command with --resume
    adds the answers that are missing, none twice. A request without a seed gets one that follows from its custom_id.
    All lines are checked before the model is loaded; one with an error counts as answered. The status is 1 if some
    lines failed.
    """
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
    wrong = errors or output.with_name(f"{output.name}.errors")
    _check(source, output, wrong, resume=resume, overwrite=overwrite)
    from gapless.server.batch import Answered, Batch, only_run, read_answered, read_batch
    from gapless.server.supervisor import start_message

    with only_run(output):
        answered = read_answered(output, wrong) if resume else Answered()
        ids = {line.custom_id for line in read_batch(source)}
        if not answered.ids <= ids:
            raise ConfigError(f"--resume: {output} has answers to requests that {source} does not have")
        if answered.ids == ids:
            failed = f"; {answered.failed} of them with an error: to ask again, take it out of {wrong}"
            said = f"nothing to add: all {len(ids)} lines have an answer{failed if answered.failed else ''}"
            warn(said if ids else "the input has no lines")
            raise typer.Exit(1 if answered.failed else 0)
        start = start_message(model, engine, load=load, shape=shape, tokenizer=tokenizer, timeline=0)
        batch = Batch(
            source, output, wrong, answered=answered, total=len(ids), model_names=tuple(served_model_name or ())
        )
        say(f"loading {shape or model} ...")
        try:
            with sigterm_leaves(lambda: f"terminated; {batch.progress()}"):
                batch.run(start)
        except KeyboardInterrupt:
            leave_on_sigint()
            warn(f"interrupted; {batch.progress()}")
            raise typer.Exit(INTERRUPTED) from None
        except OSError:  # such as a full disk; it names the file
            warn(batch.progress())
            raise
        failed = f", {batch.failed} failed, in {wrong}" if batch.failed else ""
        warn(f"{batch.done - batch.failed} of {batch.total} lines answered, in {output}{failed}")
        raise typer.Exit(1 if batch.failed else 0)


def _check(source: Path, output: Path, errors: Path, *, resume: bool, overwrite: bool) -> None:
    """The files, before anything is loaded. Raises InputFileError, ConfigError."""
    if not source.is_file():
        raise InputFileError(f"there is no input file {source}")
    if resume and overwrite:
        raise ConfigError("--resume keeps the answers and --overwrite drops them: give one of them")
    for path, what in ((output, "output"), (errors, "file of errors")):
        check_target(path, what)
        if path.exists() and path.samefile(source):
            raise ConfigError(f"{path} is both input and output: that would destroy the input")
        if path.exists() and path.stat().st_size and not (resume or overwrite):
            raise ConfigError(f"the {what} {path} is not empty: give --resume to add to it, or --overwrite")
    if output.resolve() == errors.resolve():
        raise ConfigError(f"{output} can not be for answers and for errors")
