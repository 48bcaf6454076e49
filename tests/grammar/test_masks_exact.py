"""Masks against all tokens tried one by one."""

from __future__ import annotations

import random

import pytest
import regex

from gapless.grammar.compiler import GrammarCompiler
from gapless.grammar.spec import GrammarSpec
from gapless.text.detokenize import bytes_of_token
from gapless.text.tokenizer import Tokenizer
from support.grammars import STOPS, V, allowed


@pytest.fixture(scope="module")
def token_bytes(smollm: Tokenizer) -> list[bytes]:
    """Of all tokens; the special ones have none that a grammar could match."""
    inner = smollm._inner  # pyright: ignore[reportPrivateUsage]
    special = {i for i, token in inner.get_added_tokens_decoder().items() if token.special}
    return [b"" if i in special else bytes_of_token(inner.id_to_token(i)) for i in range(V)]


def spec_of(**arguments: object) -> GrammarSpec:
    spec = GrammarSpec.of(**arguments)  # pyright: ignore[reportArgumentType]
    assert spec is not None
    return spec


@pytest.mark.parametrize(
    "choices",
    [["yes", "no"], ["hello", "help", "hell"], ["a", "ab", "abc"], ['say "hi"\\', "tab\there", "line\nend", "// #"]],
)
def test_a_choice_allows_what_continues_one_of_them(
    compiler: GrammarCompiler, token_bytes: list[bytes], choices: list[str]
):
    ends = [choice.encode() for choice in choices]
    grammar = compiler.compile(spec_of(choice=choices))
    rng = random.Random(1)
    for _ in range(8):
        matcher, done = grammar.matcher(), b""
        while not matcher.ended:
            wanted = [t for t, new in enumerate(token_bytes) if new and any(e.startswith(done + new) for e in ends)]
            assert allowed(matcher) == sorted(wanted + (list(STOPS) if done in ends else []))
            assert matcher.accepting == (done in ends)
            token = rng.choice(allowed(matcher))
            done += b"" if token in STOPS else token_bytes[token]
            matcher.accept(token)
        assert done in ends


def test_a_choice_may_have_characters_that_take_several_tokens(compiler: GrammarCompiler, token_bytes: list[bytes]):
    choices = ["😀 é", "😁", "中文"]
    grammar, rng = compiler.compile(spec_of(choice=choices)), random.Random(2)
    for _ in range(8):
        matcher, done = grammar.matcher(), b""
        while not matcher.ended:
            ends = [choice.encode() for choice in choices]
            wanted = [t for t, new in enumerate(token_bytes) if new and any(e.startswith(done + new) for e in ends)]
            assert allowed(matcher) == sorted(wanted + (list(STOPS) if done in ends else []))
            token = rng.choice(allowed(matcher))
            done += b"" if token in STOPS else token_bytes[token]
            matcher.accept(token)


@pytest.mark.parametrize(
    "pattern",
    [
        r"[0-9]{3}-[0-9]{4}",
        r"(foo|foobar)+(, [a-c]{2})?",
        r"^(0|[1-9][0-9]*)(\.[0-9]+)?$",
        r"[^a-z\x80-\xff]*x",
        r"a?b?c?",
    ],
)
def test_a_regex_allows_what_can_still_match(compiler: GrammarCompiler, token_bytes: list[bytes], pattern: str):
    judge = regex.compile(pattern.encode(), regex.DOTALL)
    source = pattern.replace(r"\x80-\xff", r"\x{80}-\x{10FFFF}")
    grammar, rng = compiler.compile(spec_of(regex=source)), random.Random(3)
    matcher, done = grammar.matcher(), b""
    for _ in range(6):
        wanted = [t for t, new in enumerate(token_bytes) if new and judge.fullmatch(done + new, partial=True)]
        complete = judge.fullmatch(done) is not None
        assert allowed(matcher) == sorted(wanted + (list(STOPS) if complete else []))
        token = rng.choice(allowed(matcher))
        matcher.accept(token)
        if matcher.ended:
            break
        done += token_bytes[token]


def test_a_forced_text_may_be_cut_into_tokens_in_any_way(compiler: GrammarCompiler, smollm: Tokenizer):
    matcher = compiler.compile(spec_of(choice=["hello world"])).matcher()
    assert {smollm.decode([i]) for i in allowed(matcher)} == {"h", "he", "hel", "hell", "hello"}


def test_a_special_token_comes_where_a_grammar_names_it(compiler: GrammarCompiler):
    matcher = compiler.compile(spec_of(grammar='start: <|im_start|> "a"')).matcher()
    assert allowed(matcher) == [1]
    assert 1 not in allowed(compiler.compile(spec_of(regex="(?s:.)*")).matcher())


@pytest.mark.parametrize("choices", [["ab", "a b", "é1"], ["a", " a", "  b"]])
def test_a_decoder_that_drops_the_first_space_is_taken_into_account(spaced: Tokenizer, choices: list[str]):
    size = spaced.vocab_size
    grammar = GrammarCompiler(spaced, size, (2,)).compile(spec_of(choice=choices))
    rng, seen = random.Random(4), set[str]()
    for _ in range(60):
        matcher, ids = grammar.matcher(), list[int]()
        while not matcher.ended:
            token = rng.choice(allowed(matcher, -(-size // 32)))
            matcher.accept(token)
            ids.append(token)
        seen.add(spaced.decode(ids))
    assert seen == {choice for choice in choices if not choice.startswith(" ")}
