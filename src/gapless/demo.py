"""The demo: 45 prompts answered at once, synchronously and one step ahead, and what that changes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from gapless.trace.record import Trace

MAX_TOKENS = 96  # of each answer, unless asked otherwise
SHOWN = 4
NOISE = 0.05
LOOKAHEADS = (0, 1)


@dataclass(frozen=True, slots=True)
class Measured:
    """One run over all prompts. `busy_share` is the part of the time that the compute stream was computing."""

    lookahead: int
    texts: list[str]
    token_ids: list[list[int]]
    seconds: float
    busy_share: float

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.token_ids)) / self.seconds


def load_prompts() -> list[str]:
    """The prompts that come with the package."""
    lines = files("gapless").joinpath("data/demo_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines if line.strip()]


def measure(prompts: list[str], lookahead: int, model: str, max_tokens: int, trace: Trace | None = None) -> Measured:
    """A fresh engine, a short warm-up, then all prompts at once, greedy."""
    from gapless import LLM, EngineConfig, SamplingParams
    from gapless.loading import load_engine

    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    config = EngineConfig(lookahead=lookahead, max_rows=64)
    with LLM.from_loaded(load_engine(model, config, trace=trace)) as llm:
        llm.chat(chats[:4], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
        before = llm.stats()
        started = time.perf_counter()
        outputs = llm.chat(chats, params)
        seconds = time.perf_counter() - started
        after = llm.stats()
    active = after.active_seconds - before.active_seconds
    return Measured(
        lookahead=lookahead,
        texts=[output.outputs[0].text for output in outputs],
        token_ids=[output.outputs[0].token_ids for output in outputs],
        seconds=seconds,
        busy_share=(after.busy_seconds - before.busy_seconds) / active if active else 0.0,
    )


def run_demo(
    model: str = "demo", count: int | None = None, max_tokens: int = MAX_TOKENS, trace: Trace | None = None
) -> int:
    """Run both and print what came of it. Returns the exit status: 1 if the runs gave different tokens.

    count  answer only this many of the prompts.
    Raises GaplessError.
    """
    from gapless.weights.source import resolve_model

    console = Console(highlight=False)
    resolve_model(model)
    prompts = load_prompts()[:count]
    words = sum(len(prompt.split()) for prompt in prompts)
    name = "SmolLM2-135M-Instruct" if model == "demo" else model
    console.print(f"[bold]Gapless[/bold] answers {len(prompts)} prompts ({words} words) at once with {name}.")
    runs: list[Measured] = []
    for lookahead in LOOKAHEADS:
        console.print(f"  lookahead {lookahead} ({'synchronous' if lookahead == 0 else 'one step ahead'}) ...")
        runs.append(measure(prompts, lookahead, model, max_tokens, trace))
    _show_answers(console, prompts, runs[-1], max_tokens)
    if model == "demo":
        console.print("A model of 135M parameters gets facts wrong: look at the speed, not at the knowledge.")
    return _show_comparison(console, runs)


def _show_answers(console: Console, prompts: list[str], run: Measured, max_tokens: int) -> None:
    by_size = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for place in dict.fromkeys(by_size[round(part * (len(by_size) - 1) / (SHOWN - 1))] for part in range(SHOWN)):
        prompt = " ".join(prompts[place].split())
        title = Text(prompt if len(prompt) <= 90 else prompt[:87] + "...", style="bold cyan")
        body = Text(run.texts[place].strip())
        if len(run.token_ids[place]) >= max_tokens:
            body.append(f" ... [cut at {max_tokens} tokens]", style="dim")
        console.print(Panel(body, title=title, title_align="left", width=min(console.width, 100)))


def _show_comparison(console: Console, runs: list[Measured]) -> int:
    table = Table("lookahead", "generated tokens", "seconds", "tokens/s", "compute stream busy")
    for column in table.columns[1:]:
        column.justify = "right"
    for run in runs:
        tokens = sum(map(len, run.token_ids))
        table.add_row(
            f"{run.lookahead} ({'synchronous' if run.lookahead == 0 else 'ahead'})",
            str(tokens),
            f"{run.seconds:.1f}",
            f"{run.tokens_per_second:.0f}",
            f"{run.busy_share:.1%}",
        )
    console.print(table)
    differing = [
        place for place, pair in enumerate(zip(*(run.token_ids for run in runs), strict=True)) if pair[0] != pair[1]
    ]
    if differing:
        places = ", ".join(map(str, differing))
        console.print(f"[red]The two runs gave different tokens for {len(differing)} prompts[/red] ({places}).")
    else:
        console.print(f"[green]Both runs gave the same tokens for all {len(runs[0].texts)} prompts.[/green]")
    _show_next_steps(console, compare_times(*runs))
    return 1 if differing else 0


def compare_times(synchronous: Measured, ahead: Measured) -> str:
    """In a sentence; what is less than 5 % counts as noise of a single run each."""
    change = ahead.seconds / synchronous.seconds - 1
    if abs(change) < NOISE:
        return "Both runs took about as long."
    return f"Running ahead took {abs(change):.0%} {'less' if change < 0 else 'more'} time here, in one run each."


def _show_next_steps(console: Console, compared: str) -> None:
    console.print(
        "\nNext (the command is in .venv/bin after make demo):\n"
        "  gapless chat                               talk to the model\n"
        '  gapless generate "Why is the sky blue?"    one answer\n'
        "  gapless serve                              OpenAI's API and a page, at http://127.0.0.1:8000\n"
        "  gapless generate --help                    many answers, from a file\n"
        "  gapless bench --help                       measure this machine\n"
        f"\n{compared}\n"
        "On a CPU, host and model share the cores, and what else runs there moves the times more than lookahead does.\n"
        "On a GPU, lookahead removes the idle time between steps. Try there:\n"
        "  gapless bench decode",
        markup=False,
    )
