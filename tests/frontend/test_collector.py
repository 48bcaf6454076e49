"""Records into generations: text along the way is the text at the end."""

import random

import numpy as np
import pytest

from frontend.tiny import tiny_tokenizer
from gapless.collector import Collector, Prepared
from gapless.errors import InternalError
from gapless.outcome import Committed, Finished, LogprobLines, PromptLogprobs
from gapless.outputs import TokenLogprob
from gapless.params import SamplingParams
from gapless.request import FinishReason, Request
from support.hash_model import VOCAB


def prepared(request_id: int) -> Prepared:
    prompt = np.asarray([1, 2, 3], dtype=np.int32)
    return Prepared((Request(request_id, prompt, SamplingParams(), 100, np.zeros(0, dtype=np.int32), 0),), "abc")


def record(tokens: dict[int, int], *finished: Finished) -> Committed:
    ids = np.asarray(list(tokens), dtype=np.int64)
    return Committed(ids, np.asarray(list(tokens.values()), dtype=np.int32), finished)


@pytest.mark.parametrize("seed", range(40))
def test_text_read_along_the_way_adds_up_to_the_text_decoded_at_once(seed: int):
    rng = random.Random(seed)
    words = tiny_tokenizer()
    read, unread = Collector(words), Collector(words)
    pieces: list[str] = []
    streamed, whole = read.add(prepared(7)), unread.add(prepared(7))
    token_ids = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 30]))]
    for token in token_ids:
        read.take(record({7: token}))
        unread.take(record({7: token}))
        if rng.random() < 0.6:
            pieces += [each.text for each in streamed.output(delta=True).outputs]
    for collector in (read, unread):
        collector.take(record({}, Finished(7, FinishReason.LENGTH, len(token_ids))))
    pieces += [each.text for each in streamed.output(delta=True).outputs]
    assert "".join(pieces) == whole.output().outputs[0].text == words.decode(token_ids)
    assert streamed.output() == whole.output()
    assert streamed.output(delta=True).outputs == []


def test_only_changed_requests_are_returned_and_unknown_ones_are_ignored():
    collector = Collector(None)
    for request_id in (1, 2, 3):
        collector.add(prepared(request_id))
    assert collector.discard(3)
    changed = collector.take(record({2: 5, 3: 6, 99: 7}, Finished(3, FinishReason.CANCELLED, 1)))
    assert [each.request_id for each in changed] == [2]
    assert collector.open_ids() == [1, 2]


def test_a_cancelled_request_ends_without_a_token():
    collector = Collector(tiny_tokenizer())
    collector.add(prepared(1))
    (ended,) = collector.take(record({}, Finished(1, FinishReason.CANCELLED, 0)))
    output = ended.output()
    assert output.finished
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("", "cancelled")


def test_a_lost_token_is_noticed():
    collector = Collector(None)
    collector.add(prepared(1))
    with pytest.raises(InternalError, match="ended with 2 tokens"):
        collector.take(record({1: 4}, Finished(1, FinishReason.STOP, 2)))


def several(params: SamplingParams, *request_ids: int) -> Prepared:
    prompt, none = np.asarray([1, 2, 3], dtype=np.int32), np.zeros(0, dtype=np.int32)
    requests = [
        Request(each, prompt, params, 100, none, 0, leader=-1 if not place else request_ids[0])
        for place, each in enumerate(request_ids)
    ]
    return Prepared(tuple(requests), None, "abc")


def lines(*tokens: int) -> LogprobLines:
    """Token, then its two followers and nothing more."""
    ids = np.asarray([[token, token + 1, token + 2, -1] for token in tokens], dtype=np.int32)
    logprobs = np.asarray([[-1.5, -0.5, -1.0, -np.inf]] * len(tokens), dtype=np.float32)
    return LogprobLines(ids, logprobs, np.asarray([3] * len(tokens), dtype=np.int32))


def test_a_prompt_is_finished_when_all_of_its_continuations_are():
    collector = Collector(tiny_tokenizer())
    generation = collector.add(several(SamplingParams(n=3), 4, 9, 6))
    assert len(collector) == 1
    assert collector.open_ids() == [4, 9, 6]
    collector.take(record({4: 5, 9: 6, 6: 7}, Finished(9, FinishReason.STOP, 1, cached=7)))
    output = generation.output()
    assert (output.finished, output.usage.completion_tokens, output.usage.cached_tokens) == (False, 3, 0)
    collector.take(record({4: 8}, Finished(4, FinishReason.LENGTH, 2, cached=2)))
    assert len(collector) == 1
    [changed] = collector.take(record({}, Finished(6, FinishReason.ERROR, 1, error="no token")))
    output = changed.output()
    assert output.finished
    assert not len(collector)
    assert collector.open_ids() == []
    assert [(each.index, each.token_ids, each.finish_reason, each.error) for each in output.outputs] == [
        (0, [5, 8], "length", None),
        (1, [6], "stop", None),
        (2, [7], "error", "no token"),
    ]
    assert [each.text for each in output.outputs] == ["abceh", "abcf", "abcg"]
    assert output.usage.completion_tokens == 4
    assert output.usage.cached_tokens == 2


def test_a_delta_has_the_continuations_that_changed_and_the_prompt_logprobs_once():
    collector = Collector(tiny_tokenizer())
    generation = collector.add(several(SamplingParams(n=2, logprobs=1, prompt_logprobs=3), 4, 5))
    nothing = np.zeros(0, dtype=np.int64)
    for begin in (1, 2):
        piece = PromptLogprobs(4, begin, lines(10 + begin))
        assert collector.take(Committed(nothing, nothing.astype(np.int32), (), None, (piece,))) == []
    foreign = PromptLogprobs(5, 1, lines(13))  # of the second continuation, which has the same prompt
    both = np.asarray([5, 4]), np.asarray([20, 30], dtype=np.int32)
    collector.take(Committed(*both, (), lines(20, 30), (foreign,)))
    first = generation.output(delta=True)
    found = TokenLogprob(11, -1.5, 3, ((12, -0.5), (13, -1.0)))
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[:2] == [None, found]
    assert len(first.prompt_logprobs) == 3
    assert [each.logprobs for each in first.outputs] == [
        [TokenLogprob(30, -1.5, 3, ((31, -0.5),))],
        [TokenLogprob(20, -1.5, 3, ((21, -0.5),))],
    ]
    collector.take(Committed(np.asarray([5]), np.asarray([8], dtype=np.int32), (), lines(8)))
    second = generation.output(delta=True)
    assert second.prompt_logprobs is None
    assert [(each.index, each.token_ids, each.text) for each in second.outputs] == [(1, [8], "h")]
    assert [each.token_id for each in second.outputs[0].logprobs or ()] == [8]
    assert generation.output().prompt_logprobs == first.prompt_logprobs


@pytest.mark.parametrize("wrong", [None, lines(6)])
def test_a_token_whose_log_probability_is_missing_or_of_another_is_noticed(wrong: LogprobLines | None):
    collector = Collector(None)
    collector.add(several(SamplingParams(logprobs=0), 1))
    with pytest.raises(InternalError, match="without its log probability"):
        collector.take(Committed(np.asarray([1]), np.asarray([5], dtype=np.int32), (), wrong))


def test_a_gap_in_the_prompt_logprobs_is_noticed():
    collector = Collector(None)
    collector.add(several(SamplingParams(prompt_logprobs=0), 1))
    nothing = np.zeros(0, dtype=np.int64)
    with pytest.raises(InternalError, match="those from 2 on"):
        collector.take(Committed(nothing, nothing.astype(np.int32), (), None, (PromptLogprobs(1, 2, lines(3)),)))
