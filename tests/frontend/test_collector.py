"""Records into generations: text along the way is the text at the end."""

import random

import numpy as np
import pytest

from frontend.tiny import tiny_tokenizer
from gapless.collector import Collector, Prepared
from gapless.errors import InternalError
from gapless.outcome import Committed, Finished
from gapless.request import FinishReason, Request, SamplingParams
from support.hash_model import VOCAB


def prepared(request_id: int) -> Prepared:
    prompt = np.asarray([1, 2, 3], dtype=np.int32)
    return Prepared(Request(request_id, prompt, SamplingParams(), 100, np.zeros(0, dtype=np.int32), 0), "abc")


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
            pieces.append(streamed.advance()[0])
    for collector in (read, unread):
        collector.take(record({}, Finished(7, FinishReason.LENGTH, len(token_ids))))
    pieces.append(streamed.advance()[0])
    assert "".join(pieces) == whole.output().outputs[0].text == words.decode(token_ids)
    assert streamed.output() == whole.output()
    assert streamed.output(delta=True).outputs[0].text == ""


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
