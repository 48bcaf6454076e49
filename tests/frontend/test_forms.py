"""Answers with a form, from the parameter to the text: grammars, and a function of the caller's."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from frontend.tiny import num_held_blocks, tiny_engine, tiny_tokenizer
from gapless import LLM, SamplingParams
from gapless.errors import InvalidRequestError
from gapless.forms import Forms
from gapless.params import AllowedTokens
from support.hash_model import EOS, VOCAB

WORDS = tiny_tokenizer()


def even(ids: Sequence[int]) -> list[int]:
    """After each token those of the same parity, and an end after ten."""
    return [EOS] if len(ids) >= 12 else [token for token in range(1, 61) if token % 2 == ids[-1] % 2]


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_forms_hold_beside_answers_without_one_also_after_a_preemption(lookahead: int):
    pattern = "[a-d]{9}(x|yz)"
    params = [
        SamplingParams(regex=pattern, max_tokens=40, seed=1),
        SamplingParams(max_tokens=40, ignore_eos=True, seed=2),
        SamplingParams(allowed_tokens=even, max_tokens=40, seed=3),
        SamplingParams(choice=["abc", "abd,e"], max_tokens=40, seed=4),
        SamplingParams(regex=pattern, max_tokens=40, n=3, seed=5),
        SamplingParams(allowed_tokens=even, max_tokens=40, n=2, seed=6),
    ]
    prompts = [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 13]]
    with LLM.from_loaded(tiny_engine(lookahead=lookahead, num_blocks=16)) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.stats().scheduler.preemptions
        streamed = ""
        for delta in llm.stream(prompts[0], params[0]):
            streamed += delta.text
        assert streamed == outputs[0].outputs[0].text
    with LLM.from_loaded(tiny_engine(lookahead=0)) as llm:
        alone = [llm.generate(prompt, each, use_tqdm=False)[0] for prompt, each in zip(prompts, params, strict=True)]
    assert [[each.token_ids for each in output.outputs] for output in outputs] == [
        [each.token_ids for each in output.outputs] for output in alone
    ]
    for place in (0, 4):
        for each in outputs[place].outputs:
            assert re.fullmatch(pattern, each.text)
            assert each.finish_reason == "stop"
    assert len({each.text for each in outputs[4].outputs}) > 1
    assert outputs[3].outputs[0].text in ("abc", "abd,e")
    for place in (2, 5):
        for each in outputs[place].outputs:
            parity = prompts[place][-1] % 2
            assert [token % 2 for token in each.token_ids] == [parity] * 10 + [EOS]


def test_an_answer_cut_by_max_tokens_says_so_and_is_the_beginning_of_one():
    with LLM.from_loaded(tiny_engine()) as llm:
        [output] = llm.generate("a", SamplingParams(regex="[ab]{50}", max_tokens=8), use_tqdm=False)
    assert output.outputs[0].finish_reason == "length"
    assert re.fullmatch("[ab]{1,50}", output.outputs[0].text)


def test_the_function_gets_a_list_of_prompt_and_answer_that_is_its_own():
    seen: list[Sequence[int]] = []

    def look(ids: Sequence[int]) -> Sequence[int]:
        seen.append(list(ids))
        assert isinstance(ids, list)
        ids.clear()
        return np.asarray([7, 8])  # pyright: ignore[reportReturnType]

    with LLM.from_loaded(tiny_engine(lookahead=2)) as llm:
        [output] = llm.generate([4, 5], SamplingParams(allowed_tokens=look, max_tokens=5), use_tqdm=False)
    tokens = output.outputs[0].token_ids
    assert seen == [[4, 5, *tokens[:count]] for count in range(5)]


@pytest.mark.parametrize("returned", [(7, 8), {7, 8}, range(7, 9), iter([7, 8]), np.asarray([8, 7]), [7, np.int64(8)]])
def test_the_function_may_return_any_collection_of_ids(returned: object):
    with LLM.from_loaded(tiny_engine()) as llm:
        params = SamplingParams(allowed_tokens=lambda _: returned, max_tokens=1)  # pyright: ignore[reportArgumentType]
        [output] = llm.generate([4], params, use_tqdm=False)
    assert output.outputs[0].token_ids[0] in (7, 8)


def raising(ids: Sequence[int]) -> list[int]:
    raise KeyError("a\nkey") if len(ids) > 4 else SystemExit(3)


def three_and_then(last: object) -> AllowedTokens:
    """A function that goes wrong after three tokens."""

    def function(ids: Sequence[int]) -> Any:
        if len(ids) < 5:
            return [3]
        return raising(ids) if last is raising else last

    return function


WRONG: list[tuple[object, str]] = [
    ([], "allowed_tokens allows no token"),
    ([61], "allowed_tokens returned token id 61, which is outside"),
    ([3, -1], "allowed_tokens returned token id -1, which is outside"),
    ([2**70], "allowed_tokens must return token ids"),
    (["a"], "allowed_tokens must return token ids"),
    ([1.0], "allowed_tokens must return token ids"),
    ([True], "allowed_tokens must return token ids"),
    ([[3]], "allowed_tokens must return token ids"),
    (np.zeros((2, 2), dtype=np.int32), "allowed_tokens must return token ids"),
    (None, "allowed_tokens raised TypeError"),
    (raising, "allowed_tokens raised KeyError: 'a"),
]


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize(("last", "said"), WRONG)
def test_a_wrong_function_ends_its_own_answer_and_no_other(last: object, said: str, lookahead: int):
    wrong = SamplingParams(allowed_tokens=three_and_then(last), max_tokens=20, n=2, stop="zq")
    plain = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with LLM.from_loaded(tiny_engine(lookahead=lookahead)) as llm:
        failed, other = llm.generate([[4, 5], [6]], [wrong, plain], use_tqdm=False)
        assert failed.finished
        for each in failed.outputs:
            assert each.finish_reason == "error"
            assert each.error is not None
            assert each.error.startswith(said)
            assert each.token_ids == [3, 3, 3]
            assert each.text == WORDS.decode([3, 3, 3])
        assert len(other.outputs[0].token_ids) == 20
        *_, last = llm.stream([4, 5], wrong)
        assert last.finish_reason == "error"
        assert (last.error or "").startswith(said)
        llm.generate([4], plain, use_tqdm=False)
        assert num_held_blocks(llm.loaded) == 0


def test_a_function_that_wants_to_exit_ends_its_own_answer():
    with LLM.from_loaded(tiny_engine()) as llm:
        [output] = llm.generate([4], SamplingParams(allowed_tokens=raising), use_tqdm=False)
        assert output.outputs[0].error == "allowed_tokens raised SystemExit: 3"
        assert output.outputs[0].token_ids == []


def test_an_end_waits_for_min_tokens_unless_nothing_else_may_follow():
    params = SamplingParams(allowed_tokens=lambda _: [EOS, 7], logit_bias={EOS: 100}, min_tokens=5, max_tokens=20)
    alone = SamplingParams(allowed_tokens=lambda _: [9], stop_token_ids=(9,), ignore_eos=True, min_tokens=5)
    with LLM.from_loaded(tiny_engine()) as llm:
        [output], [ended] = (llm.generate([4], each, use_tqdm=False) for each in (params, alone))
        [pattern] = llm.generate([4], SamplingParams(regex="a{0,9}", min_tokens=4), use_tqdm=False)
    assert output.outputs[0].token_ids == [7] * 5 + [EOS]
    assert ended.outputs[0].token_ids == [9]
    assert len(pattern.outputs[0].text) >= 4


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"regex": "("}, "regex can not be compiled"),
        ({"json_schema": {"type": "nonsense"}}, "json_schema can not be compiled"),
        ({"grammar": "begin: "}, "grammar can not be compiled"),
        ({"json_schema": "{"}, "is not JSON"),
        ({"regex": "a", "choice": ["b"]}, "at most one grammar"),
        ({"choice": []}, "1 to"),
        ({"allowed_tokens": 3}, "must be a function"),
        ({"allowed_tokens": even, "regex": "a"}, "does not go together"),
        ({"regex": "a", "bad_words": ["a"]}, "does not go together"),
        ({"regex": "a", "allowed_token_ids": [3]}, "does not go together"),
        ({"regex": "a", "ignore_eos": True}, "does not go together"),
        ({"json_object": 1}, "true or false"),
        ({"choice": ["Q"]}, "can not be compiled"),
    ],
)
def test_a_wrong_form_is_refused_with_nothing_queued(params: dict[str, object], said: str):
    with LLM.from_loaded(tiny_engine()) as llm:
        with pytest.raises(InvalidRequestError, match=said):
            llm.generate([4], SamplingParams(**params), use_tqdm=False)  # pyright: ignore[reportArgumentType]
        assert llm.stats().scheduler.steps == 0


def test_many_threads_make_one_compiler():
    with LLM.from_loaded(tiny_engine()) as llm:
        forms = llm.loaded.forms
        found: list[object] = []
        threads = [
            threading.Thread(target=lambda: found.append(forms._get_compiler()))  # pyright: ignore[reportPrivateUsage]
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(map(id, found))) == 1


def test_a_grammar_without_an_end_is_refused_and_not_on_the_engines_thread():
    forms = Forms(WORDS, VOCAB, ())
    with pytest.raises(InvalidRequestError, match="needs a stop token"):
        forms.form_of(SamplingParams(regex="a"), [1], ())
    assert forms.form_of(SamplingParams(regex="a"), [1], (5,)) is not None
    assert forms.form_of(SamplingParams(), [1], ()) is None
