from __future__ import annotations

from typing import Any

import pytest

from gapless.errors import InvalidRequestError
from gapless.grammar import spec as limits
from gapless.grammar.spec import GrammarSpec


def test_nothing_asked_for_is_no_grammar():
    assert GrammarSpec.of() is None
    assert GrammarSpec.of(json_object=False, choice=None) is None


def test_a_schema_keeps_the_order_of_its_keys():
    spec = GrammarSpec.of(json_schema={"properties": {"b": {}, "a": {"type": "string"}}, "type": "object"})
    assert spec is not None
    assert spec.text == '{"properties":{"b":{},"a":{"type":"string"}},"type":"object"}'


def test_a_schema_as_an_object_and_as_text_are_the_same_key():
    as_object = GrammarSpec.of(json_schema={"enum": ["é", 1, None, 1.5]})
    as_text = GrammarSpec.of(json_schema='{ "enum" : ["\\u00e9", 1, null, 1.5] }')
    assert as_object == as_text
    assert len({as_object, as_text}) == 1


def test_the_same_text_of_another_kind_is_another_key():
    assert GrammarSpec.of(regex="abc") != GrammarSpec.of(grammar="abc")


def test_a_schema_that_is_true_allows_all():
    assert GrammarSpec.of(json_schema=True) == GrammarSpec.of(json_schema={}) == GrammarSpec.of(json_schema="true")


def test_a_choice_that_is_given_twice_counts_once():
    assert GrammarSpec.of(choice=["a", "b", "a"]) == GrammarSpec.of(choice=("a", "b"))


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"regex": "a", "json_object": True}, "at most one grammar, not json_object and regex"),
        ({"choice": []}, "1 to 4096 strings, not 0"),
        ({"choice": ["a", ""]}, "not empty"),
        ({"choice": ["a", 1]}, "must be a string"),
        ({"choice": "ab"}, "must be a list"),
        ({"choice": ["x"] * 5000}, "not 5000"),
        ({"choice": ["x" * limits.MAX_CHOICES_SIZE]}, "the limit is"),
        ({"choice": ["\ud800"]}, "surrogate"),
        ({"regex": ""}, "empty"),
        ({"regex": b"a"}, "must be a string"),
        ({"regex": "a" * (limits.MAX_REGEX + 1)}, "the limit is 8192"),
        ({"regex": "a\0"}, "NUL"),
        ({"regex": "\udfff"}, "surrogate"),
        ({"grammar": "x" * (limits.MAX_GRAMMAR + 1)}, "the limit is"),
        ({"grammar": 3}, "must be a string"),
        ({"json_object": "yes"}, "true or false"),
        ({"json_schema": "{"}, "is not JSON"),
        ({"json_schema": '{"a":1e999}'}, "is not JSON"),
        ({"json_schema": {"a": float("nan")}}, "is not JSON"),
        ({"json_schema": {"a": object()}}, "is not JSON"),
        ({"json_schema": {1: {}}}, "key that is no string"),
        ({"json_schema": "[]"}, "must be a JSON object"),
        ({"json_schema": False}, "must be a JSON object"),
        ({"json_schema": 7}, "an object or its JSON text"),
        ({"json_schema": {"x-guidance": {"lenient": True}}}, "x-guidance"),
        ({"json_schema": nested(200)}, "nested deeper"),
        ({"json_schema": nested(20_000)}, "nested deeper"),
        ({"json_schema": {"const": "x" * limits.MAX_SCHEMA}}, "the limit is"),
        ({"json_schema": {"items": {"pattern": "a" * 3000}}}, "pattern"),
        ({"json_schema": {"patternProperties": {"a" * 3000: {}}}}, "pattern"),
        ({"json_schema": {"multipleOf": 999_983}}, "multipleOf"),
    ],
)
def test_a_wrong_constraint_is_refused_with_what_to_change(arguments: dict[str, Any], message: str):
    with pytest.raises(InvalidRequestError, match=message):
        GrammarSpec.of(**arguments)
