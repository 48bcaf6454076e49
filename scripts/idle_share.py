"""Predicted idle share against host cost: the table and the plot of docs/correctness.md.

pip install matplotlib, then: python scripts/idle_share.py docs/idle_share.svg
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from gapless.bench.predict import Prediction, predict

DEVICE = 1e-3
COPY = 10e-6
RATIOS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
JITTERS = {0.0: "every step costs the host the same", 0.5: "the host's cost varies by half (standard deviation)"}
LOOKAHEADS = (0, 1, 2)
COLOURS = ("#c2410c", "#0f766e", "#4338ca")
STEPS = 2000


def shares() -> dict[tuple[float, int, float], Prediction]:
    """By jitter, lookahead and host cost over device step."""
    return {
        (jitter, ahead, ratio): predict(
            ahead, host=ratio * DEVICE, device=DEVICE, copy=COPY, jitter=jitter, steps=STEPS
        )
        for jitter in JITTERS
        for ahead in LOOKAHEADS
        for ratio in RATIOS
    }


def table(found: dict[tuple[float, int, float], Prediction]) -> str:
    """Markdown, idle shares in per cent."""
    heads = [f"lookahead {ahead}" + (", jitter 0.5" if jitter else "") for jitter in JITTERS for ahead in LOOKAHEADS]
    lines = ["| host cost / device step | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for ratio in RATIOS:
        cells = [f"{found[jitter, ahead, ratio].idle_share:.1%}" for jitter in JITTERS for ahead in LOOKAHEADS]
        lines.append(f"| {ratio:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: dict[tuple[float, int, float], Prediction], path: str) -> None:
    """One panel for each jitter."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "gapless"  # the same file from the same figures
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(JITTERS), figsize=(9, 3.6), sharey=True)
    panel: Any
    for panel, (jitter, title) in zip(panels, JITTERS.items(), strict=True):
        for ahead, colour in zip(LOOKAHEADS, COLOURS, strict=True):
            values = [found[jitter, ahead, ratio].idle_share * 100 for ratio in RATIOS]
            style = {"marker": "osD"[ahead], "color": colour, "markersize": 5 - ahead / 2, "linewidth": 3 - ahead}
            panel.plot(RATIOS, values, label=f"lookahead {ahead}", **style)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("host cost of a step / device time of a step")
        panel.grid(alpha=0.25)
        panel.set_ylim(-2, 75)
    panels[0].set_ylabel("device idle, % of the time")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None, facecolor="white")


def main() -> None:
    """Print the table; draw the plot where the first argument says."""
    torch.set_num_threads(1)
    found = shares()
    if len(sys.argv) > 1:
        plot(found, sys.argv[1])
    print(table(found))


if __name__ == "__main__":
    main()
