"""Thousands of sampled answers that must have a form, judged by jsonschema and `re`: python scripts/form_samples.py.

The demo model at temperature 1, in batches in which every fourth request asks for no form. Every answer that ended
must be of its form, and every one that max_tokens cut must be a beginning of it. Needs jsonschema.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema

from gapless import LLM, SamplingParams
from gapless.grammar.compiler import GrammarCompiler
from gapless.grammar.spec import GrammarSpec

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["person", "robot"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
NESTED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
        "owner": {"anyOf": [{"type": "null"}, PERSON]},
        "score": {"type": "number"},
    },
    "required": ["title", "tags", "owner"],
    "additionalProperties": False,
}
REGEX = r"[A-Z][a-z]{1,9} [0-9]{3}-[0-9]{4}( \(work\))?"
CHOICES = ["yes", "no", "not sure at all", "yes, of course"]
GRAMMAR = 'start: term (("+" | "-") term)*\nterm: /[1-9][0-9]{0,3}/ | "(" start ")"'
SUMS = re.compile(r"[0-9()+\-]+")
FORMS: dict[str, dict[str, Any]] = {
    "person": {"json_schema": PERSON},
    "nested": {"json_schema": NESTED},
    "any object": {"json_object": True},
    "regex": {"regex": REGEX},
    "choice": {"choice": CHOICES},
    "grammar": {"grammar": GRAMMAR},
}
QUESTIONS = [
    "Describe a person you know.",
    "Tell me about a robot that paints.",
    "Who should I call about the broken lift?",
    "Is it going to rain?",
    "Add some numbers for me.",
    "Write something about a book, in JSON.",
]


def is_of_form(form: str, text: str) -> bool:
    """Judged without the library that made the masks."""
    if form == "regex":
        return re.fullmatch(REGEX, text) is not None
    if form == "choice":
        return text in CHOICES
    if form == "grammar":
        return SUMS.fullmatch(text) is not None and isinstance(eval(text, {"__builtins__": {}}), int)
    value = json.loads(text)
    if form == "any object":
        return isinstance(value, dict)
    return jsonschema.Draft202012Validator(PERSON if form == "person" else NESTED).is_valid(value)


def requests(count: int, max_tokens: int) -> Iterator[tuple[str, str, SamplingParams]]:
    forms = itertools.cycle(FORMS)
    for number in range(count):
        form = "" if number % 4 == 3 else next(forms)
        asked = FORMS.get(form, {})
        yield form, QUESTIONS[number % 5 + number % 2], SamplingParams(seed=number, max_tokens=max_tokens, **asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--max-tokens", type=int, default=120)
    parser.add_argument("--lookahead", type=int, default=1)
    options = parser.parse_args()
    asked = list(requests(options.count, options.max_tokens))
    seen, wrong = Counter[tuple[str, str]](), list[str]()
    with LLM("demo", lookahead=options.lookahead) as llm:
        chats = [[{"role": "user", "content": question}] for _, question, _ in asked]
        outputs = llm.chat(chats, [params for _, _, params in asked])  # pyright: ignore[reportArgumentType]
        tokenizer, vocab = llm.loaded.tokenizer, llm.loaded.engine.admission.model
        assert tokenizer is not None
        compiler = GrammarCompiler(tokenizer, vocab.vocab_size, vocab.eos_token_ids)
        for (form, _, params), output in zip(asked, outputs, strict=True):
            answer = output.outputs[0]
            seen[form or "no form", str(answer.finish_reason)] += 1
            if not form:
                continue
            fine = answer.finish_reason == "stop" and is_of_form(form, answer.text)
            if answer.finish_reason == "length":
                spec = params.grammar_spec
                assert isinstance(spec, GrammarSpec)
                matcher = compiler.compile(spec).matcher()
                for token in answer.token_ids:
                    matcher.accept(token)
                fine = matcher.error is None
            if not fine:
                wrong.append(f"{form}: {answer.finish_reason} {answer.text!r}")
    for (form, reason), number in sorted(seen.items()):
        print(f"{form:12} {reason:8} {number:6}")
    print(f"{sum(seen.values())} answers, {len(wrong)} wrong")
    for line in wrong[:20]:
        print("WRONG", line)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
