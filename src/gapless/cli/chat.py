"""`gapless chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING

import typer

from gapless.cli import options
from gapless.cli.sampling import ChatOptions, with_options
from gapless.cli.setup import load_llm, make_config, warn
from gapless.cli.signals import INTERRUPTED
from gapless.cli.timeline import tracing
from gapless.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from gapless.llm import LLM
    from gapless.params import SamplingParams

_HELP = """/reset  forget the conversation
/exit   leave (so do /quit and Ctrl-D)
/help   this list
Ctrl-C stops an answer; at the prompt, twice leaves.
"""


_DEFAULTS = ChatOptions()


@with_options(ChatOptions)
def chat(
    model: options.Model = "demo",
    system: options.System = None,
    load: options.Load = "auto",
    seed: options.Seed = 0,
    sampling: ChatOptions = _DEFAULTS,
    lookahead: options.Lookahead = 1,
    max_model_len: options.MaxModelLen = None,
    kv_cache_memory: options.KVCacheMemory = None,
    block_size: options.BlockSize = 16,
    prefix_cache: options.PrefixCache = True,
    deterministic: options.Deterministic = False,
    graphs: options.Graphs = True,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trace: options.Trace = None,
    config: options.Config = None,
) -> None:
    """Talk to a model. Answers stream; /help lists the commands. Also reads turns, one a line, from a pipe."""
    params = sampling.params()
    engine = make_config(
        lookahead=lookahead,
        max_rows=4,
        max_batch_tokens=None,
        max_model_len=max_model_len,
        kv_cache_memory=kv_cache_memory,
        num_blocks=None,
        block_size=block_size,
        prefix_cache=prefix_cache,
        deterministic=deterministic,
        graphs=graphs,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    with (
        tracing(trace) as recorder,
        load_llm(model, engine, load=load, shape=None, tokenizer=None, trace=recorder) as llm,
    ):
        if not llm.loaded.has_chat_template:
            raise ConfigError(f"{llm.loaded.model_name} has no chat template; gapless generate --raw continues text")
        Conversation(llm, params, system).run()


class Conversation:
    """The turns so far, and what becomes of the next line."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._start = [{"role": "system", "content": system}] if system else []
        self._turns = list(self._start)
        self._at_terminal = sys.stdin.isatty()

    def run(self) -> None:
        """Until /exit, the end of the input, or Ctrl-C twice. Raises typer.Exit with 130 for the last."""
        if self._at_terminal:
            self._print(f"{self._llm.loaded.model_name} on {self._llm.loaded.device_name}. /help lists the commands.\n")
        interrupted = False
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                self._print("\n")
                if interrupted or not self._at_terminal:
                    raise typer.Exit(INTERRUPTED) from None
                self._print("Ctrl-C again or /exit leaves.\n")
                interrupted = True
                continue
            interrupted = False
            if line is None or line in ("/exit", "/quit"):
                return
            self._act(line)

    def _act(self, line: str) -> None:
        if not line:
            return
        if line == "/reset":
            self._turns = list(self._start)
            self._print("The conversation starts anew.\n")
        elif line == "/help":
            self._print(_HELP)
        elif line.startswith("/") and line[1:].isalpha():
            self._print(f"There is no command {line}; /help lists them.\n")
        else:
            self._answer(line)

    def _answer(self, text: str) -> None:
        """Stream an answer and remember both turns; an interrupted one as far as it came."""
        turns = [*self._turns, {"role": "user", "content": text}]
        answer: list[str] = []
        error: str | None = None
        try:
            with closing(self._llm.stream({"messages": turns}, self._params)) as deltas:
                for delta in deltas:
                    answer.append(delta.text)
                    self._print(delta.text)
                    error = delta.error
        except KeyboardInterrupt:
            self._print(" [stopped]")
            if not self._at_terminal:
                self._print("\n")
                raise typer.Exit(INTERRUPTED) from None
        except InvalidRequestError as refused:
            warn(f"error: {refused}; /reset starts anew")
            return
        self._print("\n")
        if error is not None:
            warn(f"error: {error}")
        self._turns = [*turns, {"role": "assistant", "content": "".join(answer)}]

    def _read(self) -> str | None:
        """The next line without its end, None at the end of the input."""
        if self._at_terminal:
            try:
                return input("> ").strip()
            except EOFError:
                self._print("\n")
                return None
        line = sys.stdin.readline()
        return line.strip() if line else None

    def _print(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
