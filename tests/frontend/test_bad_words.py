"""bad_words from a text to the tokens that are banned, and what is too much."""

from __future__ import annotations

import pytest
import torch

from frontend.tiny import answer, tiny_engine, tiny_tokenizer
from gapless import LLM, SamplingParams
from gapless.errors import InvalidRequestError
from gapless.prompts import PromptEncoder
from support.hash_model import EOS, prefix_hash, scores

WORDS = tiny_tokenizer()
ENCODER = PromptEncoder(WORDS, None)


def encoded(*words: str | list[int], ends: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    return ENCODER.bad_words(SamplingParams(bad_words=words), ends)


def test_a_text_is_banned_as_it_begins_a_text_and_as_it_comes_after_a_space():
    a, b, space = (WORDS.encode(letter)[0] for letter in "ab ")
    assert encoded("a") == [(a,), (space, a)]
    assert encoded("ab", [5], "ab", [a, b]) == [(a, b), (space, a, b), (5,)]
    assert encoded([5, 6], [7]) == [(5, 6), (7,)]


def test_begin_and_end_tokens_are_no_part_of_a_bad_word():
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(WORDS._inner.to_str())  # pyright: ignore[reportPrivateUsage]
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<end> $0", special_tokens=[("<end>", 0)])
    from gapless.text.tokenizer import Tokenizer

    marked = PromptEncoder(Tokenizer(inner), None)
    assert marked.encode("a").token_ids == [0, *WORDS.encode("a")]
    assert marked.bad_words(SamplingParams(bad_words=["a"]), ()) == encoded("a")


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_no_answer_has_a_bad_word(lookahead: int):
    prompts = [[1, 2, 3], [7], [9, 9, 9, 9], [30, 4]]
    answers = [answer(prompt, 40) for prompt in prompts]
    # pairs and single tokens of the very answers that they would have
    words = [[tokens[3]] for tokens in answers if len(tokens) > 3 and tokens[3] != EOS]
    words += [tokens[at : at + 2] for tokens in answers for at in (0, 6) if len(tokens) > at + 1]
    params = SamplingParams(temperature=0, max_tokens=40, bad_words=words)
    with LLM.from_loaded(tiny_engine(lookahead=lookahead, num_blocks=48)) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(prompt)
        for token in output.outputs[0].token_ids:
            found = scores(torch.tensor([prefix_hash(tokens)]))[0]
            for word in words:
                if tokens[len(tokens) - len(word) + 1 :] == word[:-1]:
                    found[word[-1]] = -1
            assert token == int(found.argmax())
            tokens.append(token)
    assert any(output.outputs[0].token_ids != tokens for output, tokens in zip(outputs, answers, strict=True))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("a", "a list of texts"),
        ([""], "1 to 256 characters"),
        (["a" * 257], "1 to 256 characters"),
        ([[]], "at least 1"),
        ([[1] * 17], "at most 16"),
        ([["a"]], "integer"),
        ([-1], "list of token ids"),
        ([[-1]], "between 0"),
        (["a"] * 129, "at most 128"),
        (7, "a list of texts"),
    ],
)
def test_bad_words_out_of_bounds_are_refused(words: object, said: str):
    with pytest.raises(InvalidRequestError, match=said):
        SamplingParams(bad_words=words)  # pyright: ignore[reportArgumentType]


def test_what_only_the_tokenizer_can_tell_is_refused_with_nothing_queued():
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [one + other for one in letters for other in letters]
    with LLM.from_loaded(tiny_engine()) as llm:
        for words, said in (
            (["a" * 16], "1 to 16 tokens"),  # 17 after a space
            (["é" * 9], "1 to 16 tokens"),
            (["Q"], "has 0"),
            ([*pairs[:64], [30, 31]], "128 sequences of several tokens"),
            ([[61]], "outside the vocabulary"),
            ([[token] for token in range(61)], "no token that could be sampled"),
        ):
            with pytest.raises(InvalidRequestError, match=said):
                llm.generate("abc", SamplingParams(bad_words=words), use_tqdm=False)
        assert llm.stats().scheduler.steps == 0
    assert len(encoded(*pairs[:64])) == 128
    assert len(encoded("a" * 15)) == 2


def test_single_tokens_and_held_back_ends_share_their_room():
    words = [[token] for token in range(128)]
    assert len(encoded(*words, ends=tuple(range(120, 256)))) == 128
    with pytest.raises(InvalidRequestError, match="256 single tokens"):
        encoded(*words, ends=tuple(range(1000, 1129)))


def test_ends_take_room_only_if_they_are_held_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gapless.prompts.MAX_BANS", 3)
    words = [[4], [5]]
    with LLM.from_loaded(tiny_engine()) as llm:
        for params in (
            SamplingParams(bad_words=words, min_tokens=1),
            SamplingParams(bad_words=words, stop_token_ids=(6,)),
            SamplingParams(bad_words=words, stop_token_ids=(6,), min_tokens=1, ignore_eos=True),
        ):
            llm.prepare([1], params)
        with pytest.raises(InvalidRequestError, match="single tokens"):
            llm.prepare([1], SamplingParams(bad_words=words, stop_token_ids=(6,), min_tokens=1))
