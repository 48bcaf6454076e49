"""Random JSON schemas of what the grammars support, and random regexes."""

from __future__ import annotations

import random
from typing import Any

NAMES = ["name", "id", "a b", "é", "x_1", 'q"', "back\\slash", "tags", "n"]


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = [string, integer, number, boolean, enum, const, null]
    if depth < 3:
        kinds += [array, array, obj, obj, obj, any_of]
    return rng.choice(kinds if depth else [array, obj, obj, any_of])(rng, depth)


def string(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 4)
    plain = {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 12)}
    patterns = [r"^[A-Z]{2,4}-[0-9]{1,3}$", r"^(foo|bar)+$", r"[0-9]", r"^\+?[0-9 ]{3,12}$"]
    patterned = {"type": "string", "pattern": rng.choice(patterns), "maxLength": 24}
    formatted = {"type": "string", "format": rng.choice(["date", "date-time", "uuid", "ipv4"])}
    return rng.choice([plain, plain, patterned, formatted])


def integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    bounds: list[dict[str, Any]] = [
        {"minimum": low, "maximum": low + rng.randint(0, 5000)},
        {"exclusiveMinimum": low, "exclusiveMaximum": low + rng.randint(2, 100)},
        {"multipleOf": rng.choice([2, 5, 7])},
        {},
    ]
    return {"type": "integer", **rng.choice(bounds)}


def number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.uniform(-50, 50)
    return {"type": "number", **rng.choice([{"minimum": low, "maximum": low + rng.uniform(0.5, 100)}, {}])}


def boolean(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "boolean"}


def null(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": ["null", "boolean"]}


def enum(rng: random.Random, depth: int) -> dict[str, Any]:
    values: list[Any] = ["red", "redder", 3, 3.5, None, True, '\n\t"', "中"]
    return {"enum": rng.sample(values, rng.randint(1, 4))}


def const(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"const": rng.choice(["only", 7, {"k": [1, "x"]}])}


def array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    schema: dict[str, Any] = {"type": "array", "items": random_schema(rng, depth + 1)}
    schema |= {"minItems": least, "maxItems": least + rng.randint(0, 3)}
    if rng.random() < 0.3:
        schema["prefixItems"] = [random_schema(rng, depth + 1)]
    return schema


def obj(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {n: random_schema(rng, depth + 1) for n in names}}
    schema["required"] = [n for n in names if rng.random() < 0.6]
    schema["additionalProperties"] = rng.choice([False, False, {"type": "integer"}])
    return schema


def any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        item = random_schema(rng, depth + 1)
        tree = {"type": "object", "properties": {"v": item, "next": {"$ref": "#/$defs/t"}}, "required": ["v"]}
        if not depth:
            return {"$ref": "#/$defs/t", "$defs": {"t": tree | {"additionalProperties": False}}}
    return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(2, 3))]}


def random_regex(rng: random.Random, depth: int = 0) -> str:
    """Bounded, so that a walk ends, and the same to Python's re."""
    if depth == 3 or rng.random() < 0.3:
        return rng.choice(["a", "foo", "[a-f]", "[^x]", r"[0-9]", r"\.", "é", "[A-Z]{2}", " ", r"\n", '"', "/"])
    parts = [random_regex(rng, depth + 1) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.3:
        return "(" + "|".join(parts) + ")"
    low = rng.randint(0, 2)
    repeat = rng.choice(["", "", "?", f"{{{low},{low + rng.randint(0, 3)}}}"])
    return f"({''.join(parts)}){repeat}"
