"""Runs one above the other on the same time scale, as an SVG that stands alone and suits dark and light."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import groupby

from gapless.spans import Span
from gapless.trace.window import COMPUTE, HOST, Window, is_wait

WIDTH = 1000
_LEFT, _RIGHT = 84, 16
_PLOT = WIDTH - _LEFT - _RIGHT
_LANES = ((HOST, "host", 24), ("h2d", "H2D", 11), (COMPUTE, "compute", 30), ("d2h", "D2H", 11))  # and heights
_GAP = 5
_HEAD = 46
_BLOCK = _HEAD + sum(height + _GAP for _, _, height in _LANES)
_FOOT = 64
_THINNEST = 1.4
_LETTER = 6.3  # width of one at 11 px
_SLOTS = 4  # colours; more slots share them
_LONGEST_TEXT = 80
_TICKS = 8

_STYLE = """
svg{--paper:#fff;--ink:#1f2937;--soft:#6b7280;--line:#e5e7eb;--on:#fff;--idle:#dc2626;--wait:#8b95a5;--plain:#6b7280;
--s0:#2563eb;--s1:#b45309;--s2:#0f766e;--s3:#7c3aed;font-family:system-ui,sans-serif}
@media (prefers-color-scheme:dark){svg{--paper:#0f172a;--ink:#e5e7eb;--soft:#94a3b8;--line:#273449;--on:#0b1220;
--idle:#f87171;--wait:#64748b;--plain:#94a3b8;--s0:#60a5fa;--s1:#fbbf24;--s2:#2dd4bf;--s3:#c4b5fd}}
.paper{fill:var(--paper)}text{fill:var(--ink);font-size:12px}.name{font-size:15px;font-weight:600}.soft{fill:var(--soft)}
.far{text-anchor:end}.mid{text-anchor:middle}.on{fill:var(--on);font-size:11px;text-anchor:middle;pointer-events:none}
.red{fill:var(--idle);font-size:11px;font-weight:600;text-anchor:middle;paint-order:stroke;stroke:var(--paper);
stroke-width:4px;pointer-events:none}.grid{stroke:var(--line)}.end{stroke:var(--soft)}
.s0{fill:var(--s0)}.s1{fill:var(--s1)}.s2{fill:var(--s2)}.s3{fill:var(--s3)}.plain{fill:var(--plain)}
.wait{fill:url(#waits)}.idle{fill:url(#idles);stroke:var(--idle);stroke-width:.7}
g rect{stroke:var(--paper);stroke-width:.4}g:hover rect{stroke:var(--ink);stroke-width:1.2}
"""
_PATTERNS = (
    '<defs><pattern id="idles" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<path d="M0 0V6" style="stroke:var(--idle);stroke-width:2.4"/></pattern>'
    '<pattern id="waits" width="5" height="5" patternUnits="userSpaceOnUse">'
    '<circle cx="1.2" cy="1.2" r="0.8" style="fill:var(--wait)"/></pattern></defs>'
)


def draw(windows: Sequence[Window]) -> str:
    """An SVG element. All windows begin at the left edge; the longest one ends at the right edge, others at a line."""
    length = max(window.seconds for window in windows)
    height = len(windows) * _BLOCK + _FOOT
    label = "; ".join(f"{window.run.name}: {summary(window)}" for window in windows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{clean(label, 400)}"><style>{_STYLE}</style>{_PATTERNS}'
        f'<rect class="paper" width="{WIDTH}" height="{height}" rx="8"/>',
        *_axis(length, len(windows) * _BLOCK),
    ]
    for index, (window, title) in enumerate(zip(windows, titles(windows), strict=True)):
        parts += _block(window, title, length, index * _BLOCK)
    parts += _legend(windows, height)
    return "".join(parts) + "</svg>"


def titles(windows: Sequence[Window]) -> list[str]:
    """The names of the runs, with their notes if these differ."""
    differ = len({window.run.note for window in windows}) > 1
    return [f"{run.name}, {run.note}" if differ and run.note else run.name for run in (each.run for each in windows)]


def summary(window: Window) -> str:
    """The figures of a window in words."""
    count = len(window.steps)
    return (
        f"{count} step{'s' if count > 1 else ''} in {milliseconds(window.seconds)}: "
        f"{milliseconds(window.step_seconds)} a step, compute idle {window.idle_share:.1%}"
    )


def milliseconds(seconds: float) -> str:
    """With three significant digits or so."""
    value = seconds * 1e3
    return f"{value:.0f} ms" if value >= 100 else f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f} ms"


def clean(text: str, longest: int = _LONGEST_TEXT) -> str:
    """Text from a file, fit to stand in markup."""
    kept = "".join(letter if letter.isprintable() else " " for letter in text)
    return escape(kept if len(kept) <= longest else kept[: longest - 1] + "…")


def _block(window: Window, title: str, length: float, top: float) -> list[str]:
    """One run: its title, its figures and its lanes."""
    parts = [
        f'<text class="name" x="16" y="{top + 30}">{clean(title)}</text>',
        f'<text class="far" x="{WIDTH - _RIGHT}" y="{top + 30}">{summary(window)}</text>',
    ]
    spans = sorted(window.spans(), key=lambda span: span.begin)
    y = top + _HEAD
    for lane, shown, height in _LANES:
        parts.append(f'<text class="soft far" x="{_LEFT - 10}" y="{y + height / 2 + 4:g}">{shown}</text>')
        if lane == COMPUTE:
            parts += _idle(window, length, y, height)
        in_lane = (span for span in spans if span.lane == lane)
        for _, group in groupby(in_lane, key=lambda span: (span.step, is_wait(span))):
            parts += _group(list(group), window, length, y, height)
        y += height + _GAP
    if window.seconds < length:
        x, _ = _place(window.end, window.end, window, length)
        parts.append(f'<path class="end" d="M{x:.2f} {top + _HEAD - 4:g}V{y:g}"/>')
    return parts


def _idle(window: Window, length: float, y: float, height: float) -> list[str]:
    parts: list[str] = []
    for begin, end in window.idle():
        left, width = _place(begin, end, window, length)
        what = f"idle\n{milliseconds(end - begin)}"
        parts.append(f"<g>{_rect('idle', left, y, width, height)}<title>{what}</title></g>")
        if width > 5 * _LETTER:
            parts.append(f'<text class="red" x="{left + width / 2:.1f}" y="{y + height / 2 + 4:g}">idle</text>')
    return parts


def _group(spans: list[Span], window: Window, length: float, y: float, height: float) -> list[str]:
    """Spans of one lane and step that follow each other, with one label."""
    parts: list[str] = []
    for span in spans:
        if span.end > span.begin:
            left, width = _place(span.begin, span.end, window, length)
            style = "wait" if is_wait(span) else _colour(span.slot)
            parts.append(f"<g>{_rect(style, left, y, width, height)}<title>{_details(span, window.begin)}</title></g>")
    step = spans[0].step
    if parts and step >= 0 and height > 2 * _LETTER and not is_wait(spans[0]):
        left, room = _place(spans[0].begin, spans[-1].end, window, length)
        fitting = next((name for name in (f"step {step}", f"{step}") if len(name) * _LETTER < room), None)
        if fitting is not None:
            parts.append(f'<text class="on" x="{left + room / 2:.1f}" y="{y + height / 2 + 4:g}">{fitting}</text>')
    return parts


def _details(span: Span, origin: float) -> str:
    what = clean(span.label) + ("\nthe host waits" if is_wait(span) else "")
    return f"{what}\n{milliseconds(span.end - span.begin)}, from {(span.begin - origin) * 1e3:.3f} ms on"


def _colour(slot: str) -> str:
    return f"s{(ord(slot[0]) - ord('A')) % _SLOTS}" if slot else "plain"


def _place(begin: float, end: float, window: Window, length: float) -> tuple[float, float]:
    """Left edge and width in the picture, cut off at the window's edges."""
    times = (min(max(at, window.begin), window.end) - window.begin for at in (begin, end))
    left, right = (_LEFT + _PLOT * time / length for time in times)
    return left, max(right - left, _THINNEST)


def _rect(style: str, left: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{style}" x="{left:.2f}" y="{y:g}" width="{width:.2f}" height="{height:g}" rx="1.5"/>'


def _axis(length: float, bottom: float) -> list[str]:
    """Grid lines and their times."""
    rough = length / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    tick = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    digits = max(0, -math.floor(math.log10(tick * 1e3) + 1e-9))
    parts: list[str] = []
    for number in range(int(length / tick + 1e-9) + 1):
        x = _LEFT + _PLOT * number * tick / length
        parts.append(f'<path class="grid" d="M{x:.1f} {_HEAD - 6}V{bottom + 4:g}"/>')
        name = f"{number * tick * 1e3:.{digits}f}" + (" ms" if number == 0 else "")
        parts.append(f'<text class="soft mid" x="{x:.1f}" y="{bottom + 18:g}">{name}</text>')
    return parts


def _legend(windows: Sequence[Window], height: float) -> list[str]:
    """The slots that are to be seen, waiting and idling; at the right the note that all runs share."""
    slots = sorted({span.slot for window in windows for span in window.spans() if span.slot})[:_SLOTS]
    marks = [(_colour(slot), f"slot {clean(slot, 8)}") for slot in slots]
    marks += [("wait", "host waits"), ("idle", "device idles")]
    parts: list[str] = []
    x = float(_LEFT)
    for style, title in marks:
        parts.append(_rect(style, x, height - 27, 22, 12))
        parts.append(f'<text x="{x + 28:g}" y="{height - 17:g}">{title}</text>')
        x += 28 + len(title) * 6.6 + 16
    notes = {window.run.note for window in windows}
    note = clean(notes.pop()) if len(notes) == 1 else ""
    parts.append(f'<text class="soft far" x="{WIDTH - _RIGHT}" y="{height - 17:g}">{note}</text>')
    return parts
