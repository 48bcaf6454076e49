"""Random tokens under the masks end in what independent libraries accept, and never stand where nothing is left."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import pytest

from gapless.grammar.compiler import GrammarCompiler
from gapless.grammar.matcher import Grammar
from gapless.grammar.spec import GrammarSpec
from gapless.text.tokenizer import Tokenizer
from support.effort import effort
from support.grammars import STOPS, Walker, allowed
from support.random_schemas import random_regex, random_schema

PART = effort(25, 40)
SCHEMAS = 3 * PART


def ended_walk(grammar: Grammar, walker: Walker, hasty: Walker, tokenizer: Tokenizer, most: int) -> str:
    """A text that ended, if not in `most` tokens then in some more that hurry."""
    matcher = grammar.matcher()
    tokens, ended = walker.walk(matcher, most)
    if not ended:
        rest, ended = hasty.walk(matcher, 3000)
        tokens += rest
    assert ended
    return tokenizer.decode(tokens)


@pytest.mark.parametrize("part", range(SCHEMAS // PART))
@pytest.mark.parametrize("haste", [0.0, 0.5])
def test_what_a_schema_allows_is_valid(compiler: GrammarCompiler, smollm: Tokenizer, part: int, haste: float):
    walker, hasty = Walker(smollm, part, haste), Walker(smollm, part, 0.9)
    for number in range(part * PART, (part + 1) * PART):
        schema = random_schema(random.Random(number))
        spec = GrammarSpec.of(json_schema=schema)
        assert spec is not None
        text = ended_walk(compiler.compile(spec), walker, hasty, smollm, 60)
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize("haste", [0.0, 0.5])
def test_a_json_object_can_be_read(compiler: GrammarCompiler, smollm: Tokenizer, haste: float):
    spec = GrammarSpec.of(json_object=True)
    assert spec is not None
    walker, hasty = Walker(smollm, 5, haste), Walker(smollm, 6, 0.9)
    for _ in range(effort(12, 40)):
        text = ended_walk(compiler.compile(spec), walker, hasty, smollm, 80)
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("part", range(2))
def test_what_a_regex_allows_matches_it(compiler: GrammarCompiler, smollm: Tokenizer, part: int):
    walker = Walker(smollm, part)
    for number in range(part * 60, (part + 1) * 60):
        pattern = random_regex(random.Random(number))
        spec = GrammarSpec.of(regex=pattern)
        assert spec is not None
        tokens, ended = walker.walk(compiler.compile(spec).matcher(), 2000)
        assert ended
        assert re.fullmatch(pattern, smollm.decode(tokens)), pattern


def test_whitespace_between_the_parts_of_json_is_bounded(compiler: GrammarCompiler, smollm: Tokenizer):
    spec = GrammarSpec.of(json_object=True)
    assert spec is not None
    matcher = compiler.compile(spec).matcher()
    for text in ["{", "\n"]:
        matcher.accept(smollm.encode(text)[0])
    spaces = {i for i in range(smollm.vocab_size) if (text := smollm.decode([i])) and not text.strip(" \t\r\n")}
    most = 0
    while most < 100 and (space := spaces & set(allowed(matcher))):
        matcher.accept(min(space, key=lambda i: len(smollm.decode([i]))))
        most += 1
    assert matcher.error is None
    assert 0 < most <= 64


def test_five_hundred_random_tokens_stay_within_a_grammar_that_never_has_to_end(
    compiler: GrammarCompiler, smollm: Tokenizer
):
    spec = GrammarSpec.of(json_schema={"type": "array", "items": {"type": "string"}, "minItems": 1000})
    assert spec is not None
    matcher = compiler.compile(spec).matcher()
    tokens, ended = Walker(smollm, 7).walk(matcher, 500)
    assert not ended
    assert len(tokens) == 500
    assert not set(STOPS) & set(allowed(matcher))
