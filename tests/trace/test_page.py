"""The picture and its page: well-formed, escaped, self-contained, and true to the times."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from gapless.bench.predict import predict
from gapless.spans import Run, Span
from gapless.trace.page import page, picture
from gapless.trace.record import LANES

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</title></style><script>alert(1)</script>\"'&\x00\x1b\ud800\u202e"


@pytest.fixture(scope="module")
def predicted() -> list[Run]:
    """Lookahead 0 and 1 with the costs of a large GPU."""
    return [predict(ahead, host=8e-4, device=2.5e-3, copy=2e-5, steps=60).run for ahead in (0, 1)]


class Tags(HTMLParser):
    """Every tag must be closed in order; keeps the tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def bars(root: ET.Element, style: str) -> list[tuple[float, float]]:
    """Left edge and width of the bars of a class that have details."""
    rects = [group.find(f"{SVG}rect") for group in root.iter(f"{SVG}g")]
    return [
        (float(r.get("x", "")), float(r.get("width", ""))) for r in rects if r is not None and r.get("class") == style
    ]


def test_lookahead_0_has_its_idle_time_hatched_and_written_and_lookahead_1_has_none(predicted: list[Run]):
    root = ET.fromstring(picture(predicted, 4))
    texts = [each.text for each in root.iter(f"{SVG}text")]
    assert texts.count("lookahead 0") == texts.count("lookahead 1") == 1
    assert "4 steps in 13.4 ms: 3.34 ms a step, compute idle 25.1%" in texts
    assert "4 steps in 10.0 ms: 2.50 ms a step, compute idle 0.0%" in texts
    assert texts.count("idle") == len(bars(root, "idle")) == 4
    share = sum(width for _, width in bars(root, "idle")) / 900
    assert share == pytest.approx(0.251, abs=0.001)


def test_both_runs_have_one_time_scale(predicted: list[Run]):
    """A compute stage takes 2.5 ms of the 13.36 ms that four steps of lookahead 0 take."""
    root = ET.fromstring(picture(predicted, 4))
    stages = [width for style in ("s0", "s1") for _, width in bars(root, style) if width > 100]
    assert len(stages) == 4 + 4
    assert all(width == pytest.approx(900 * 2.5 / 13.36, abs=0.1) for width in stages)


def test_a_run_of_shorter_steps_ends_at_a_line_with_nothing_behind_it(predicted: list[Run]):
    """A copy takes so long that the host waits when the window ends."""
    root = ET.fromstring(picture([predicted[0], predict(1, host=8e-4, device=2.5e-3, copy=4e-4, steps=60).run], 4))
    (end,) = (each.get("d", "") for each in root.iter(f"{SVG}path") if each.get("class") == "end")
    x = float(end[1 : end.index(" ")])
    assert x == pytest.approx(84 + 900 * 10.0 / 13.36, abs=0.1)
    shorter = ET.fromstring(picture(predicted[1:], 4))
    assert not [each for each in shorter.iter(f"{SVG}path") if each.get("class") == "end"]
    top = float(end[end.index(" ") + 1 : end.index("V")].strip())
    rects = [rect for group in root.iter(f"{SVG}g") if (rect := group.find(f"{SVG}rect")) is not None]
    below = [rect for rect in rects if float(rect.get("y", "")) > top]
    assert below
    assert all(float(rect.get("x", "")) + float(rect.get("width", "")) < x + 2 for rect in below)


def figures(text: str) -> list[list[str]]:
    """The table of a page, row by row."""
    rows = re.findall(r"<tr>(<th scope=\"row\">.*?)</tr>", text)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]


def test_the_figures_of_a_run_do_not_depend_on_what_stands_beside_it(predicted: list[Run]):
    """One of the others takes a hundred times as long a step, one ends after two steps."""
    fast = predicted[1]
    slow = predict(0, host=8e-2, device=2.5e-1, steps=60).run
    short = predict(0, host=8e-4, device=2.5e-3, steps=60).run
    short = short._replace(name="short", spans=[span for span in short.spans if span.step < 3])
    runs = [run._replace(note="") for run in (fast, slow, short)]
    together = figures(page(runs, 4))
    assert together == [figures(page([run], 4))[0] for run in runs]
    assert together[0] == ["lookahead 1", "2.50 ms", "0.0%", "0.800 ms", "1.70 ms"]
    assert [row[2] for row in together[1:]] == ["24.2%", "24.2%"]


def test_steps_alternate_between_two_colours_at_lookahead_1(predicted: list[Run]):
    root = ET.fromstring(picture(predicted[1:], 4))
    stages = sorted((x, style) for style in ("s0", "s1") for x, width in bars(root, style) if width > 100)
    colours = [style for _, style in stages]
    assert len(colours) == 4
    assert all(first != then for first, then in pairwise(colours))


def test_a_bar_tells_its_phase_step_slot_and_time(predicted: list[Run]):
    titles = [each.text or "" for each in ET.fromstring(picture(predicted, 4)).iter(f"{SVG}title")]
    assert any(re.fullmatch(r"compute \d+ B\n2\.50 ms, from \d+\.\d{3} ms on", title) for title in titles)
    assert any(re.fullmatch(r"waited for d2h_done A\nthe host waits\n.*", title) for title in titles)
    assert any(title.startswith("idle\n") for title in titles)


def test_the_page_needs_nothing_from_outside_and_scrolls_by_keyboard(predicted: list[Run]):
    text = page(predicted, 4)
    tags = Tags(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags.seen}
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in text.replace("url(#", "")
    regions = [attributes for _, attributes in tags.seen if attributes.get("role") == "region"]
    assert all(each["tabindex"] == "0" and each["aria-label"] for each in regions)
    assert len(regions) == 2
    assert text.count("prefers-color-scheme:dark") == 2


def test_names_from_a_file_are_text_and_nothing_else():
    spans = [
        Span(lane, HOSTILE, step, HOSTILE, step + 0.1 * place, step + 0.1 * place + 0.05)
        for step in range(6)
        for place, lane in enumerate(LANES)
    ]
    runs = [Run(HOSTILE, HOSTILE, LANES, spans)]
    ET.fromstring(picture(runs, 4))
    text = page(runs, 4)
    tags = Tags(text)
    assert "script" not in {tag for tag, _ in tags.seen}
    assert not [name for _, attributes in tags.seen for name in attributes if name.startswith("on")]
    assert text.encode()
    assert not {"\x00", "\x1b", "\u202e"} & set(text)
    assert "alert(1)" in text


def test_runs_on_different_devices_tell_them_apart(predicted: list[Run]):
    one, two = predicted
    text = page([one._replace(note="a CPU"), two._replace(note="a GPU")], 4)
    assert text.count("lookahead 0, a CPU") == text.count("lookahead 1, a GPU") == 2
    assert text.count("simulated") == 0
    assert page(predicted, 4).count("simulated") == 1


def test_long_names_are_cut():
    runs = [Run("x" * 5000, "", LANES, [Span("compute", "y" * 5000, 0, "z" * 500, 0.0, 1.0)])]
    assert "x" * 500 not in page(runs, 4)
    assert "y" * 500 not in page(runs, 4)


@pytest.mark.parametrize("scale", [1e-8, 1e-6, 1e-3, 1.0, 1e4])
def test_any_time_scale_is_drawn(scale: float):
    spans = [Span("compute", "replay", at, "A", at * scale, (at + 0.5) * scale) for at in range(9)]
    root = ET.fromstring(picture([Run("run", "", LANES, spans)], 4))
    ticks = [each for each in root.iter(f"{SVG}path") if each.get("class") == "grid"]
    assert 5 <= len(ticks) <= 10
