"""The picture with its figures on one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from gapless.spans import Run
from gapless.trace.svg import clean, draw, milliseconds, titles
from gapless.trace.window import Window, typical_window

_NAMED = 2  # runs in the heading
_STYLE = """
:root{color-scheme:light dark}body{margin:0 auto;padding:1rem;max-width:80rem;font:16px/1.5 system-ui,sans-serif;
background:#f8fafc;color:#1f2937}h1{font-size:1.3rem;margin:.5rem 0}.picture{overflow-x:auto;border-radius:8px}
.picture svg{display:block;min-width:56rem;width:100%}:focus-visible{outline:3px solid #2563eb;outline-offset:2px}
table{border-collapse:collapse;margin:1rem 0}th:first-child{text-align:left}
th,td{padding:.3rem .8rem;text-align:right;white-space:nowrap;border-bottom:1px solid #cbd5e1}
.table{overflow-x:auto}
@media (prefers-color-scheme:dark){body{background:#020617;color:#e5e7eb}th,td{border-color:#334155}}
"""


def picture(runs: Sequence[Run], steps: int) -> str:
    """An SVG file."""
    return draw([typical_window(run, steps) for run in runs])


def page(runs: Sequence[Run], steps: int) -> str:
    """An HTML file: the picture, which scrolls where it is wider than the screen, and a table."""
    windows = [typical_window(run, steps) for run in runs]
    rows = "".join(_row(window, clean(title)) for window, title in zip(windows, titles(windows), strict=True))
    names = " over ".join(clean(run.name) for run in runs) if len(runs) <= _NAMED else f"{len(runs)} runs"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{names}</title><style>{_STYLE}</style></head><body><main><h1>{names}</h1>"
        f'<div class="picture" tabindex="0" role="region" aria-label="timeline">{draw(windows)}</div>'
        "<p>All on one time scale; the figures are those of the steps drawn. Point at a bar for its phase, step, slot "
        "and time.</p>"
        '<div class="table" tabindex="0" role="region" aria-label="figures"><table><thead><tr><th scope="col">run</th>'
        '<th scope="col">a step takes</th><th scope="col">compute idle</th><th scope="col">host works, a step</th>'
        f'<th scope="col">host waits, a step</th></tr></thead><tbody>{rows}</tbody></table></div>'
        "</main></body></html>\n"
    )


def _row(window: Window, title: str) -> str:
    works, waits = (window.host_seconds(waiting=waiting) for waiting in (False, True))
    return (
        f'<tr><th scope="row">{title}</th><td>{milliseconds(window.step_seconds)}</td><td>{window.idle_share:.1%}</td>'
        f"<td>{milliseconds(works)}</td><td>{milliseconds(waits)}</td></tr>"
    )
