from __future__ import annotations

import random
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from llguidance import LLExecutor

from gapless.grammar import matcher as module
from gapless.grammar.compiler import GrammarCompiler
from gapless.grammar.matcher import Matcher
from gapless.grammar.spec import GrammarSpec
from gapless.text.tokenizer import Tokenizer
from support.grammars import STOPS, V, allowed, ids_of

W = V // 32
ASKED = [
    {"json_schema": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}},
    {"json_object": True},
    {"regex": "[a-z]+ [0-9]{2,5}"},
    {"choice": ["yes", "no"]},
]


def matchers(compiler: GrammarCompiler, count: int) -> list[Matcher]:
    found: list[Matcher] = []
    for number in range(count):
        spec = GrammarSpec.of(**ASKED[number % len(ASKED)])  # pyright: ignore[reportArgumentType]
        assert spec is not None
        stops = STOPS if number % 3 else (0, 9)
        found.append(compiler.compile(spec).matcher(min_tokens=number % 5, stop_ids=stops))
    return found


def test_many_lines_at_once_are_what_each_gives_alone(compiler: GrammarCompiler):
    together, alone = matchers(compiler, 24), matchers(compiler, 24)
    mask_MW = np.full((30, W), 0x5A5A5A5A, dtype=np.int32)
    lines = random.Random(1).sample(range(30), 24)
    rng = random.Random(2)
    accepts: list[tuple[Matcher, int]] = []
    for _ in range(30):
        Matcher.fill_many(accepts, list(zip(together, lines, strict=True)), mask_MW)
        accepts = []
        for one, other, line in zip(together, alone, lines, strict=True):
            ids = allowed(other)
            assert ids_of(mask_MW[line]) == ids
            assert one.error is None
            if not other.ended:
                token = rng.choice(ids)
                other.accept(token)
                accepts.append((one, token))
        untouched = sorted(set(range(30)) - set(lines))
        assert (mask_MW[untouched] == 0x5A5A5A5A).all()


def test_tokens_come_before_lines_and_in_their_order(compiler: GrammarCompiler, smollm: Tokenizer):
    spec = GrammarSpec.of(choice=["abcd"])
    assert spec is not None
    matcher = compiler.compile(spec).matcher()
    mask_MW = np.zeros((1, W), dtype=np.int32)
    letters = [smollm.encode(letter)[0] for letter in "abc"]
    Matcher.fill_many([(matcher, token) for token in letters], [(matcher, 0)], mask_MW)
    assert [smollm.decode([i]) for i in ids_of(mask_MW[0])] == ["d"]


def test_a_failed_and_an_ended_sequence_do_not_disturb_the_others(compiler: GrammarCompiler):
    wrong, ended, fine = matchers(compiler, 3)
    ended = compiler.compile(GrammarSpec("regex", "a*")).matcher()
    mask_MW = np.full((3, W), -1, dtype=np.int32)
    Matcher.fill_many([(wrong, V + 1), (ended, STOPS[0])], [(wrong, 0), (ended, 1), (fine, 2)], mask_MW)
    assert wrong.error is not None
    assert not mask_MW[0].any()
    assert ids_of(mask_MW[1]) == sorted(STOPS)
    assert ids_of(mask_MW[2]) == allowed(fine)


class Watched:
    """An executor that says when the library is at work."""

    def __init__(self, executor: LLExecutor) -> None:
        self.busy = False
        self._executor = executor

    def unsafe_compute_mask_ptr(self, pairs: Any, pointer: int, width: int, lines: int) -> None:
        self.busy = True
        self._executor.unsafe_compute_mask_ptr(pairs, pointer, width, lines)
        self.busy = False

    def consume_token_par(self, pairs: Any) -> list[bool]:
        return self._executor.consume_token_par(pairs)


def test_python_runs_on_while_the_library_works(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch):
    """If the library held Python's lock, nobody would ever see it busy: threads do not take turns otherwise here."""
    watched = Watched(LLExecutor(2))
    monkeypatch.setattr(module, "library_threads", lambda: watched)
    grammar = compiler.compile(GrammarSpec("regex", "([a-z]+ [A-Z]*)*[0-9]"))
    mask_MW = np.zeros((256, W), dtype=np.int32)
    before, seen = sys.getswitchinterval(), 0
    sys.setswitchinterval(3600.0)
    try:
        for _ in range(200):
            fills = [(grammar.matcher(), line) for line in range(256)]
            thread = threading.Thread(target=Matcher.fill_many, args=([], fills, mask_MW))
            thread.start()
            while thread.is_alive():
                time.sleep(0)
                seen += watched.busy
            if seen:
                break
    finally:
        sys.setswitchinterval(before)
    assert seen > 0
    assert mask_MW.any(axis=1).all()
