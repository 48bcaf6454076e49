"""Step time against context, with the floor under it: measured to a JSON file, then drawn.

    PYTHONPATH=src python scripts/step_time.py -o step_time.json
    pip install matplotlib, then: python scripts/step_time.py --plot step_time.json -o docs/step_time.svg

All rows of a shape decode prompts of one length, and the engine runs with one lookahead and then, with the next token
of the same requests, with a larger one. A step's time is the median time between the outputs of two steps in which
every row decodes. The floor is bench/floors.py's for the context of those steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gapless.bench.ceilings import read_rate
from gapless.bench.environment import environment
from gapless.bench.floors import decode_floor
from gapless.bench.random_engine import RandomEngine, output_of
from gapless.config import EngineConfig
from gapless.device import has_cuda, open_device
from gapless.weights.hf_config import load_shape

CONTEXTS = (64, 256, 512, 1024, 2048, 4096, 8192)
BLOCK_SIZE = 16
SETTLE = 8  # steps before those that count
COLOURS = {0: "#c2410c", 1: "#0f766e", 2: "#4338ca"}


@dataclass(frozen=True)
class Row:
    """Times in milliseconds. context: cached tokens of a row that a step reads, the mean over rows and steps."""

    lookahead: int
    prompt_len: int
    context: float
    step_ms: float
    spread_ms: float  # between the 10th and the 90th percentile
    floor_ms: float


@dataclass(frozen=True)
class Window:
    """What was seen of steady decode at one lookahead."""

    lookahead: int
    context: float
    gaps: list[float]  # seconds


class Steps:
    """An engine on random weights, with memory for `rows` requests of the longest context."""

    def __init__(
        self, shape: str, rows: int, contexts: Sequence[int], lookaheads: Sequence[int], steps: int, device: str | None
    ) -> None:
        """Raises ConfigError, OutOfMemoryError."""
        self.rows, self.steps, self.lookaheads = rows, steps, sorted(lookaheads)
        budget = EngineConfig(max_rows=rows).token_budget(on_cpu=device == "cpu" or not has_cuda())
        limit = load_shape(shape).max_position
        # The first row decodes while the last ones are still read.
        self.new_tokens = len(lookaheads) * (SETTLE + steps) + 2 * -(-rows * max(contexts) // budget) + SETTLE
        self.prompt_lens = [min(context, limit - self.new_tokens) for context in contexts]
        longest = max(self.prompt_lens) + self.new_tokens
        config = EngineConfig(
            lookahead=max(lookaheads),
            max_rows=rows,
            max_model_len=longest,
            num_blocks=rows * -(-longest // BLOCK_SIZE),
            graph_buckets=(rows,),
            block_size=BLOCK_SIZE,
            prefix_cache=False,
            device=device,
        )
        self.random = RandomEngine(shape, config)
        self.read_rate = 0.0  # bytes per second, once measured

    def _output(self) -> int:
        """Tokens of the next step to end."""
        output = output_of(self.random.engine.next_output())
        assert not output.finished, "a request ended before the last step that counts"
        return len(output.tokens)

    def windows(self, prompt_len: int) -> Iterator[Window]:
        """One for each lookahead, from the smallest on."""
        engine = self.random.engine
        engine.set_lookahead(self.lookaheads[0])
        prompts = self.random.random_prompts([prompt_len] * self.rows)
        requests = self.random.requests(prompts, [self.new_tokens] * self.rows)
        engine.submit(requests)
        known = 0
        while (tokens := self._output()) < self.rows:
            known += tokens
        known += tokens
        for lookahead in self.lookaheads:
            engine.set_lookahead(lookahead)  # what is in flight is read first
            times, begin = list[float](), 0
            for step in range(SETTLE + self.steps + 1):
                if step == SETTLE + 1:
                    begin = known
                known += self._output()
                times.append(time.perf_counter())
            context = prompt_len + (begin + known - self.rows) / 2 / self.rows
            yield Window(lookahead, context, [b - a for a, b in itertools.pairwise(times[SETTLE:])])
        engine.cancel([request.request_id for request in requests])
        unfinished = self.rows
        while unfinished:
            unfinished -= len(output_of(engine.next_output()).finished)

    def measure(self) -> Iterator[Row]:
        """All contexts and lookaheads, the first context once before that untimed."""
        list(self.windows(self.prompt_lens[0]))
        found = [(length, window) for length in self.prompt_lens for window in self.windows(length)]
        with closing(open_device(self.random.config.device)) as device:
            self.read_rate = read_rate(device)
        for prompt_len, window in found:
            floor = decode_floor(
                self.random.model,
                self.random.dtype,
                requests=self.rows,
                prompt_len=round(window.context),
                new_tokens=1,
                read_rate=self.read_rate,
            )
            tenths = statistics.quantiles(window.gaps, n=10)
            yield Row(
                lookahead=window.lookahead,
                prompt_len=prompt_len,
                context=round(window.context, 1),
                step_ms=statistics.median(window.gaps) * 1e3,
                spread_ms=(tenths[-1] - tenths[0]) * 1e3,
                floor_ms=floor.seconds * 1e3,
            )


def measure_all(options: argparse.Namespace) -> None:
    """Write what is known after each shape."""
    found: dict[str, Any] = {"runs": []}
    for shape in options.shape or ["llama-8b", "smollm2-135m"]:
        begin = time.perf_counter()
        contexts, lookaheads = options.context or CONTEXTS, options.lookahead or [0, 1]
        steps = Steps(shape, options.rows, contexts, lookaheads, options.steps, options.device)
        with closing(steps.random):
            rows = list(steps.measure())
            facts = environment(steps.random.device_name, steps.random.torch_device)
        command = shlex.join(["python", *sys.argv])
        found["environment"] = {**facts, "command": command}
        run = {"shape": shape, "rows": options.rows, "read_rate": steps.read_rate}
        found["runs"].append({**run, "results": [asdict(row) for row in rows]})
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{shape}, {options.rows} rows, {facts['device']}, {time.perf_counter() - begin:.0f} s in all")
        for row in rows:
            print(
                f"  lookahead {row.lookahead}  context {row.context:7.1f}  step {row.step_ms:7.3f} ms  "
                f"spread {row.spread_ms:6.3f}  floor {row.floor_ms:7.3f}  ratio {row.step_ms / row.floor_ms:5.2f}",
                flush=True,
            )


def plot(found: dict[str, Any], path: Path) -> None:
    """One panel for each shape."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "gapless"  # the same file from the same figures
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found["runs"]), figsize=(4.5 * len(found["runs"]), 3.8), squeeze=False)
    panel: Any
    for panel, run in zip(panels[0], found["runs"], strict=True):
        rows = [Row(**each) for each in run["results"]]
        for nth, lookahead in enumerate(sorted({row.lookahead for row in rows})):
            line = [row for row in rows if row.lookahead == lookahead]
            style = {"marker": "osD"[nth % 3], "color": COLOURS.get(lookahead, "#64748b"), "markersize": 4}
            at = [row.context for row in line]
            panel.plot(at, [row.step_ms for row in line], label=f"lookahead {lookahead}", **style)
        best = [row for row in rows if row.lookahead == max(row.lookahead for row in rows)]
        at = [row.context for row in best]
        panel.plot(at, [row.floor_ms for row in best], "--", color="#111827", linewidth=1, label="floor: bytes to read")
        panel.set_title(f"{run['shape']}, {run['rows']} rows", fontsize=10)
        panel.set_xscale("log", base=2)
        panel.set_xticks(at, [f"{row.context:.0f}\n{row.step_ms / row.floor_ms:.2f}x" for row in best], fontsize=7)
        panel.minorticks_off()
        panel.set_xlabel(f"tokens of a row in the cache; lookahead {best[0].lookahead} over the floor", fontsize=8)
        panel.grid(alpha=0.25)
        panel.set_ylim(bottom=0)
    panels[0, 0].set_ylabel("step, ms")
    panels[0, 0].legend(frameon=False, fontsize=8)
    facts = found["environment"]
    made_on = facts["device"] + (f", commit {facts['commit']}" if "commit" in facts else "")
    figure.text(0.995, 0.01, made_on, ha="right", fontsize=7, color="#475569")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the JSON file, or the picture with --plot")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="draw what was measured; measure nothing")
    parser.add_argument("--shape", action="append", help="may be repeated; default: llama-8b and smollm2-135m")
    parser.add_argument("--rows", type=int, default=32, help="requests, all running at once")
    parser.add_argument(
        "--context", type=int, action="append", help="of the prompts, may be repeated; default: to 8192"
    )
    parser.add_argument("--lookahead", type=int, action="append", help="may be repeated; default: 0 and 1")
    parser.add_argument("--steps", type=int, default=32, help="that count, of each context and lookahead")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    options = parser.parse_args()
    if options.plot is None:
        measure_all(options)
    else:
        plot(json.loads(options.plot.read_text()), options.output)


if __name__ == "__main__":
    main()
