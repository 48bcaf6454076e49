"""Forms, stop strings, n answers and banned tokens on a real model against plain references, all in one batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import regex
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from gapless import LLM, RequestOutput, SamplingParams
from gapless.grammar.compiler import WHITESPACE
from gapless.text.tokenizer import Tokenizer
from support.oracle_steps import Edit, Logits, answers, check_greedy

pytestmark = pytest.mark.slow
NEW_TOKENS = 14
CHOICES = ["the red fox", "the red wolf", "Berlin", "Bern", "42"]
PATTERN = r"[a-c]{2,5}-\d\d?[xyz]+(\.|!)"
SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": [17, "small", "large", None]}},
    "required": ["size"],
    "additionalProperties": False,
}
FORMS: dict[str, Any] = {"choice": CHOICES, "regex": PATTERN, "json_schema": SCHEMA}
GRAMMAR = 'start: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,3}/'
Allowed = Callable[[str], Tensor]  # bool [V], what may come after a text


def even_ids(ids: list[int]) -> range:
    """An allowed_tokens function: even ids after an even number of tokens, else odd ones."""
    return range(len(ids) % 2, 49_152, 2)


def greedy(max_tokens: int = NEW_TOKENS, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)


def tokenizer_of(llm: LLM) -> Tokenizer:
    tokenizer = llm.loaded.tokenizer
    assert tokenizer is not None
    return tokenizer


def unchanged(_: Tensor, scores: Tensor) -> Tensor:
    return scores


@pytest.fixture(scope="module")
def plain(chat_llm: LLM, chats: list[list[int]], logits: Logits) -> list[RequestOutput]:
    outputs = chat_llm.generate(chats[:2], greedy(), use_tqdm=False)
    assert check_greedy(outputs, logits, [unchanged] * 2) <= 2  # near-ties
    return outputs


@pytest.fixture(scope="module")
def mixed(
    chat_llm: LLM, chats: list[list[int]], plain: list[RequestOutput], asked: dict[str, SamplingParams]
) -> dict[str, RequestOutput]:
    """Everything at once, by name, the same at every lookahead."""
    prompts = [chats[index % 2] for index in range(len(asked))]
    return dict(zip(asked, answers(chat_llm, prompts, list(asked.values())), strict=True))


@pytest.fixture(scope="module")
def asked(plain: list[RequestOutput]) -> dict[str, SamplingParams]:
    """The requests by name, of the first and the second prompt in turn."""
    even, odd = (output.outputs[0] for output in plain)
    early = odd.token_ids[4]
    return {
        "bias": greedy(logit_bias=dict.fromkeys(even.token_ids[::2], -6.0) | {314: 3.0}),
        "min_tokens": greedy(min_tokens=10, stop_token_ids=(early,)),
        "allowed": greedy(allowed_token_ids=tuple(range(0, 49_152, 3))),
        "stop": greedy(stop=[cut_of(odd.text), "never said"]),
        "stop included": greedy(stop=[cut_of(even.text)], include_stop_str_in_output=True),
        "n greedy": greedy(n=3),
        "n sampled": SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=NEW_TOKENS),
        **{name: greedy(30, **{name: form}) for name, form in FORMS.items()},
        "json_object": greedy(json_object=True),
        "grammar": greedy(grammar=GRAMMAR),
        "function": greedy(allowed_tokens=even_ids),
        "echo": greedy(echo=True, logprobs=2, prompt_logprobs=2),
    }


def cut_of(text: str) -> str:
    """From the middle of one word into the next, so that no token ends with it alone."""
    space = text.index(" ", len(text) // 2)
    return text[space - 2 : space + 3]


def check(output: RequestOutput, logits: Logits, edit: Edit) -> None:
    """Every token is the likeliest of those that are left, and it is not always the likeliest of all."""
    assert check_greedy([output], logits, [edit]) > 0


def test_logit_bias_is_that_of_transformers(
    mixed: dict[str, RequestOutput], asked: dict[str, SamplingParams], logits: Logits
):
    from transformers import SequenceBiasLogitsProcessor

    processor: Any = SequenceBiasLogitsProcessor([[[token], bias] for token, bias in asked["bias"].logit_bias.items()])
    check(mixed["bias"], logits, processor)


def test_min_tokens_is_that_of_transformers(
    mixed: dict[str, RequestOutput], asked: dict[str, SamplingParams], logits: Logits
):
    from transformers import MinNewTokensLengthLogitsProcessor

    output, [stop] = mixed["min_tokens"], asked["min_tokens"].stop_token_ids
    processor: Any = MinNewTokensLengthLogitsProcessor(len(output.prompt_token_ids), 10, [2, stop])
    check(output, logits, processor)
    assert len(output.outputs[0].token_ids) >= 10


def test_allowed_tokens_are_those_of_transformers(
    mixed: dict[str, RequestOutput], asked: dict[str, SamplingParams], logits: Logits
):
    from transformers import PrefixConstrainedLogitsProcessor

    allowed = list(asked["allowed"].allowed_token_ids or ())

    def only(place: int, ids: Tensor) -> list[int]:
        return allowed

    processor: Any = PrefixConstrainedLogitsProcessor(only, num_beams=1)
    check(mixed["allowed"], logits, processor)


@pytest.mark.parametrize(("name", "number"), [("stop", 1), ("stop included", 0)])
def test_a_stop_string_cuts_the_greedy_text(
    name: str, number: int, chat_llm: LLM, mixed: dict[str, RequestOutput], plain: list[RequestOutput]
):
    whole, [got] = plain[number].outputs[0], mixed[name].outputs
    cut = cut_of(whole.text)
    wanted = whole.text[: whole.text.index(cut)] + cut * (name == "stop included")
    assert (got.text, got.finish_reason, got.stop_reason) == (wanted, "stop", cut)
    assert got.token_ids == whole.token_ids[: len(got.token_ids)]
    decode = tokenizer_of(chat_llm).decode
    assert cut in decode(got.token_ids)
    assert cut not in decode(got.token_ids[:-1])


def test_n_greedy_answers_are_the_one_and_sampled_ones_differ(
    mixed: dict[str, RequestOutput], plain: list[RequestOutput]
):
    assert [each.token_ids for each in mixed["n greedy"].outputs] == [plain[1].outputs[0].token_ids] * 3
    assert len({tuple(each.token_ids) for each in mixed["n sampled"].outputs}) == 3


# -------------------------------------------------------------------------- forms


@pytest.fixture(scope="module")
def texts(chat_llm: LLM) -> list[str]:
    """Of every token; those that are no whole characters are no part of these forms."""
    return [tokenizer_of(chat_llm).decode([token]) for token in range(49_152)]


def masked(allowed: Allowed, output: RequestOutput, texts: list[str]) -> Edit:
    """Only what may come after the text of the answer so far."""
    prompt = len(output.prompt_token_ids)

    def edit(ids: Tensor, scores: Tensor) -> Tensor:
        text = "".join(texts[token] for token in ids[0, prompt:].tolist())
        return scores.masked_fill(~allowed(text), -torch.inf)

    return edit


def begins(texts: list[str], may_begin: Callable[[str], bool], whole: Callable[[str], bool]) -> Allowed:
    """Tokens with which a text may go on, and the end where it is whole."""

    @cache
    def allowed(text: str) -> Tensor:
        found = [len(token) > 0 and "\ufffd" not in token and may_begin(text + token) for token in texts]
        found[2] = whole(text)
        return torch.tensor(found)

    return allowed


def test_a_choice_is_made_as_by_trying_all_tokens(mixed: dict[str, RequestOutput], texts: list[str], logits: Logits):
    def begin(text: str) -> bool:
        return any(each.startswith(text) for each in CHOICES)

    output = mixed["choice"]
    check(output, logits, masked(begins(texts, begin, CHOICES.__contains__), output, texts))
    assert output.outputs[0].text in CHOICES


def test_a_regex_is_followed_as_by_trying_all_tokens(mixed: dict[str, RequestOutput], texts: list[str], logits: Logits):
    pattern, output = regex.compile(PATTERN), mixed["regex"]

    def begin(text: str) -> bool:
        return pattern.fullmatch(text, partial=True) is not None

    def whole(text: str) -> bool:
        return pattern.fullmatch(text) is not None

    check(output, logits, masked(begins(texts, begin, whole), output, texts))
    assert whole(output.outputs[0].text) or output.outputs[0].finish_reason == "length"


def test_a_schema_is_followed_as_by_a_matcher_that_is_asked_at_each_token(
    chat_llm: LLM, mixed: dict[str, RequestOutput], texts: list[str], logits: Logits
):
    inner = tokenizer_of(chat_llm)._inner  # pyright: ignore[reportPrivateUsage]
    schema = {"x-guidance": {"whitespace_pattern": WHITESPACE}, **SCHEMA}
    lark = f'start: %json {json.dumps(schema)}\n%llguidance {{"no_forcing": true}}\n'
    matcher = LLMatcher(LLTokenizer(inner.to_str(), eos_token=2), json.dumps({"grammars": [{"lark_grammar": lark}]}))
    output = mixed["json_schema"]
    prompt = len(output.prompt_token_ids)

    def edit(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > prompt:
            assert matcher.consume_token(int(ids[0, -1]))
        allowed = np.frombuffer(matcher.compute_logit_bias(), dtype=np.uint8)[: scores.shape[1]] > 0
        return scores.masked_fill(~torch.from_numpy(allowed), -torch.inf)

    check(output, logits, edit)
    assert json.loads(output.outputs[0].text)["size"] in (17, "small", "large", None)


def test_a_grammar_and_a_json_object_are_followed(mixed: dict[str, RequestOutput]):
    assert regex.fullmatch(r"[0-9]{1,3}(\+[0-9]{1,3})*\+?", mixed["grammar"].outputs[0].text, partial=True)
    assert mixed["json_object"].outputs[0].text.lstrip()[0] == "{"


def test_a_function_is_asked_for_every_token(mixed: dict[str, RequestOutput]):
    output = mixed["function"]
    begin = len(output.prompt_token_ids)
    assert [token % 2 for token in output.outputs[0].token_ids] == [
        (begin + place) % 2 for place in range(len(output.outputs[0].token_ids))
    ]
