from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher

from gapless.errors import InvalidRequestError
from gapless.grammar import compiler as module
from gapless.grammar.compiler import GrammarCompiler
from gapless.grammar.matcher import ENDLESS
from gapless.grammar.spec import GrammarSpec
from gapless.text.tokenizer import Tokenizer
from support.grammars import STOPS, V, allowed, line


def spec_of(**arguments: Any) -> GrammarSpec:
    spec = GrammarSpec.of(**arguments)
    assert spec is not None
    return spec


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"json_schema": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, r"use anyOf\): oneOf constraints"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, r"leave these keys out.*uniqueItems"),
        ({"json_schema": {"$ref": "https://example.com/x"}}, "not present in a registry"),
        ({"json_schema": {"$ref": "#"}}, "nothing matches it"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum"),
        ({"regex": "(?=a)b"}, "without it.*look-ahead"),
        ({"regex": r"a\b"}, r"without \\b"),
        ({"regex": r"(a)\1"}, "without them"),
        ({"regex": "["}, "unclosed"),
        ({"regex": "a?" * 4000}, "make it simpler"),
        ({"regex": r"[^\x00-\U0010FFFF]"}, "nothing matches it"),
        ({"grammar": 'start: "a" | ('}, r"1\(15\)"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"grammar": "start: <|im_end|>"}, "unknown special token"),
        ({"grammar": '{"grammars":[]}'}, "expecting rule"),
    ],
)
def test_what_does_not_compile_is_refused_with_the_reason(
    compiler: GrammarCompiler, arguments: dict[str, Any], message: str
):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        compiler.compile(spec_of(**arguments))
    assert "x-guidance" not in str(caught.value)
    assert "no_forcing" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_grammar_that_takes_long_for_every_token_is_refused(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "SLOW_MASK", 0.0)
    with pytest.raises(InvalidRequestError, match="for a token; make it simpler"):
        compiler.compile(spec_of(regex="slow"))


def test_equal_specs_share_a_grammar_and_old_ones_are_dropped(smollm: Tokenizer):
    compiler = GrammarCompiler(smollm, V, STOPS, cached=2)
    first = compiler.compile(spec_of(regex="a"))
    second = compiler.compile(spec_of(regex="b"))
    assert compiler.compile(spec_of(regex="a")) is first
    compiler.compile(spec_of(regex="c"))
    assert compiler.compile(spec_of(regex="a")) is first
    assert compiler.compile(spec_of(regex="b")) is not second


class Held:
    """Compiles of the library that wait until they are let go, or fail."""

    def __init__(self, held: str) -> None:
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)
        self.count = 0
        self.error: BaseException | None = None
        self._held = held

    def __call__(self, table: Any, source: str, **options: Any) -> LLMatcher:
        if self._held in source:
            self.count += 1
            self.begun.release()
            self.go.wait()
            if self.error is not None:
                raise self.error
        return LLMatcher(table, source, **options)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held("slow")
    monkeypatch.setattr(module, "LLMatcher", held)
    monkeypatch.setattr(held, "grammar_from_regex", LLMatcher.grammar_from_regex, raising=False)
    yield held
    held.go.set()
    for thread in threading.enumerate():
        if thread.name == "gapless-grammar":
            thread.join()


def test_threads_that_ask_for_the_same_wait_for_one_compile(smollm: Tokenizer, held: Held):
    compiler = GrammarCompiler(smollm, V, STOPS, seconds=60.0)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(compiler.compile, spec_of(regex="slow")) for _ in range(8)]
        held.begun.acquire()
        assert held.count == 1
        held.go.set()
        assert len({id(each.result()) for each in asked}) == 1


@pytest.mark.parametrize("error", [RuntimeError("broken"), BaseException("a panic")])
def test_a_failure_of_the_library_refuses_the_request(smollm: Tokenizer, held: Held, error: BaseException):
    compiler = GrammarCompiler(smollm, V, STOPS)
    held.error = error
    held.go.set()
    with pytest.raises(InvalidRequestError, match=f"can not be compiled: {error}"):
        compiler.compile(spec_of(regex="slow"))
    held.error = None
    assert compiler.compile(spec_of(regex="slow")).matcher().error is None


def test_many_threads_get_what_one_gets(compiler: GrammarCompiler, smollm: Tokenizer):
    specs = [spec_of(regex=f"[a-{letter}]{{{count}}}x") for letter in "bcdef" for count in (1, 2, 3)]
    alone = {spec: allowed(GrammarCompiler(smollm, V, STOPS).compile(spec).matcher()) for spec in specs}

    def ask(spec: GrammarSpec) -> tuple[GrammarSpec, list[int]]:
        return spec, allowed(compiler.compile(spec).matcher())

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, specs * 6))
    assert all(ids == alone[spec] for spec, ids in found)


def test_ids_beyond_the_tokenizer_are_never_allowed(smollm: Tokenizer):
    size = V + 77
    grammar = GrammarCompiler(smollm, size, STOPS).compile(spec_of(regex="(?s:.)*"))
    ids = allowed(grammar.matcher(), -(-size // 32))
    assert max(ids) < V
    assert set(STOPS) <= set(ids)


def test_a_stop_id_may_be_beyond_the_tokenizer(smollm: Tokenizer):
    size = V + 77
    grammar = GrammarCompiler(smollm, size, (V + 5,)).compile(spec_of(choice=["a"]))
    matcher = grammar.matcher()
    assert V + 5 not in allowed(matcher, -(-size // 32))
    matcher.accept(smollm.encode("a")[0])
    assert allowed(matcher, -(-size // 32)) == [V + 5]


def test_a_model_may_have_fewer_tokens_than_its_tokenizer(smollm: Tokenizer):
    size = 20_001
    grammar = GrammarCompiler(smollm, size, STOPS).compile(spec_of(regex="(?s:.)*"))
    ids = allowed(grammar.matcher(), -(-size // 32))
    assert max(ids) == size - 1
    assert allowed(GrammarCompiler(smollm, V, STOPS).compile(spec_of(regex="(?s:.)*")).matcher())[: len(ids)] == ids


def test_a_model_without_an_end_needs_a_stop_id_of_the_request(smollm: Tokenizer):
    grammar = GrammarCompiler(smollm, V, ()).compile(spec_of(choice=["ab"]))
    end = smollm.encode("x")[0]
    matcher = grammar.matcher(stop_ids=(end,))
    assert end not in allowed(matcher)
    matcher.accept(smollm.encode("ab")[0])
    assert allowed(matcher) == [end]
    with pytest.raises(InvalidRequestError, match="stop_token_ids"):
        grammar.matcher(stop_ids=())


def test_stop_ids_wait_for_min_tokens_unless_nothing_else_is_allowed(compiler: GrammarCompiler, smollm: Tokenizer):
    grammar = compiler.compile(spec_of(regex="a{0,3}"))
    a = smollm.encode("a")[0]
    matcher = grammar.matcher(min_tokens=2)
    for enough in (False, False, True):
        assert bool(set(STOPS) & set(allowed(matcher))) == enough
        matcher.accept(a)
    assert allowed(grammar.matcher()) == sorted({*STOPS, *allowed(matcher), a, *allowed(grammar.matcher())})
    endless = grammar.matcher(min_tokens=ENDLESS)
    for _ in range(3):
        assert not set(STOPS) & set(allowed(endless))
        endless.accept(a)
    assert allowed(endless) == sorted(STOPS)


def test_a_stop_id_that_is_text_ends_and_never_continues(compiler: GrammarCompiler, smollm: Tokenizer):
    grammar = compiler.compile(spec_of(regex="(ab?)+"))
    a, b = smollm.encode("a")[0], smollm.encode("b")[0]
    matcher = grammar.matcher(stop_ids=(b,))
    assert b not in allowed(matcher)
    matcher.accept(a)
    assert b in allowed(matcher)
    assert not set(STOPS) & set(allowed(matcher))
    matcher.accept(b)
    assert matcher.ended
    assert allowed(matcher) == [b]


def test_a_stop_id_that_blocks_the_only_way_is_an_error(compiler: GrammarCompiler, smollm: Tokenizer):
    matcher = compiler.compile(spec_of(regex="[0-9]")).matcher(stop_ids=[smollm.encode(d)[0] for d in "0123456789"])
    assert allowed(matcher) == []
    assert matcher.error is not None


def test_after_the_end_only_stop_ids_are_allowed(compiler: GrammarCompiler):
    matcher = compiler.compile(spec_of(regex="a*")).matcher()
    matcher.accept(STOPS[0])
    assert matcher.accepting
    assert matcher.error is None
    assert allowed(matcher) == sorted(STOPS)


@pytest.mark.parametrize("token", [5, 1, V, -1])
def test_a_token_that_was_not_allowed_is_an_error_of_this_sequence(compiler: GrammarCompiler, token: int):
    grammar = compiler.compile(spec_of(choice=["yes", "no"]))
    matcher = grammar.matcher()
    matcher.accept(token)
    assert matcher.error is not None
    assert not matcher.accepting
    assert allowed(matcher) == []
    assert all(grammar.matcher().error is None and allowed(grammar.matcher()) for _ in range(20))


def test_sequences_of_one_grammar_stand_apart(compiler: GrammarCompiler, smollm: Tokenizer):
    grammar = compiler.compile(spec_of(choice=["ab", "cd"]))
    first, second = grammar.matcher(), grammar.matcher()
    first.accept(smollm.encode("a")[0])
    assert [smollm.decode([i]) for i in allowed(first)] == ["b"]
    assert {smollm.decode([i]) for i in allowed(second)} == {"a", "ab", "c", "cd"}


def explosive() -> GrammarSpec:
    return spec_of(regex="[xy]*x[xy]{14}z")


def test_a_limit_that_is_hit_while_running_is_an_error_and_the_line_is_empty(
    smollm: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "limits", few_states)
    grammar = GrammarCompiler(smollm, V, STOPS).compile(explosive())
    matcher = grammar.matcher()
    rng = np.random.default_rng(1)
    mask_W = line()
    for _ in range(5000):
        matcher.fill(mask_W)
        if matcher.error is not None:
            break
        assert mask_W.any()
        matcher.accept(smollm.encode(str(rng.choice(["x", "y"])))[0])
    assert matcher.error is not None
    assert "too many states" in matcher.error
    assert not mask_W.any()


def test_a_limit_that_one_sequence_hits_does_not_reach_the_others(smollm: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "limits", few_states)
    compiler = GrammarCompiler(smollm, V, STOPS)
    grammar = compiler.compile(explosive())
    others = [grammar.matcher() for _ in range(20)]
    before = allowed(grammar.matcher())
    rng = np.random.default_rng(1)
    for each in [grammar.matcher() for _ in range(8)]:
        while each.error is None:
            allowed(each)
            each.accept(smollm.encode(str(rng.choice(["x", "y"])))[0])
    for other in [*others, *(compiler.compile(explosive()).matcher() for _ in range(20))]:
        assert allowed(other) == before
        other.accept(smollm.encode("x")[0])
        assert allowed(other)
        assert other.error is None


def test_what_hit_a_limit_is_given_to_no_later_sequence(smollm: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "limits", few_states)
    grammar = GrammarCompiler(smollm, V, STOPS).compile(explosive())
    rng = np.random.default_rng(1)
    for each in [grammar.matcher() for _ in range(8)]:
        while each.error is None:
            allowed(each)
            each.accept(smollm.encode(str(rng.choice(["x", "y"])))[0])

    def never() -> LLMatcher:
        raise AssertionError("compiled again")

    monkeypatch.setattr(grammar, "build", never)
    for _ in range(20):
        assert allowed(grammar.matcher())


def few_states() -> Any:
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=600, verbose_errors=False)


def test_a_slow_grammar_that_was_spoiled_is_compiled_again(smollm: Tokenizer):
    compiler = GrammarCompiler(smollm, V, STOPS)
    grammar = compiler.compile(spec_of(regex="ab"))
    grammar.spoiled = True
    assert compiler.compile(spec_of(regex="ab")) is not grammar
