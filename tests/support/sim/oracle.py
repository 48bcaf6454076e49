"""What a request must get, in plain Python: its whole answer, why it ends, and the log probabilities of its tokens.

Nothing of the engine's sampling is used but, for the real sampler's random choice among scores that are known here, the
reference sampler on one row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from gapless.config import SchedulerLimits
from gapless.params import SamplingParams
from gapless.request import FinishReason
from gapless.sampling.base import SamplingTables
from gapless.sampling.torch_sampler import choose
from support.hash_model import EOS, VOCAB, logits_of, position_weights
from support.sim.forms import Endings, HashForm, Tilt
from support.sim.model import SHIFT, mixed

if TYPE_CHECKING:
    from support.sim.schedule import Move

Scores = NDArray[np.float32]
Weights = tuple[tuple[int, int], ...]
"""(place, weights): what is computed from this place on comes from these weights, up to the next place."""
FIRST: Weights = ((0, 0),)
Choice = Callable[[Scores, SamplingParams, int], int]
TOLERANCE = 1e-5  # of a log probability
_PRIME = 2_147_483_629
_WEIGHTS: list[int] = position_weights(256).tolist()


def stops_of(params: SamplingParams) -> set[int]:
    """The tokens that end a request."""
    return {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}


def form_of(form: tuple[int, int, int] | None, params: SamplingParams) -> HashForm | None:
    """Of a move."""
    return None if form is None else HashForm(*form, tuple(sorted(stops_of(params))))


def mix(scores_V: Scores, params: SamplingParams, position: int) -> int:
    """What the rig's sampler draws."""
    if params.greedy:
        return int(scores_V.argmax())
    assert params.seed is not None
    low, high = np.asarray([params.seed], dtype=np.uint64).view(np.int32)
    floats = np.asarray([params.temperature, params.top_p, params.min_p], dtype=np.float32).view(np.int32)
    words = [low, high, position, floats[0], params.top_k, floats[1], floats[2]]
    return int(mixed(scores_V[None], [np.asarray([word], dtype=np.int64) for word in words])[0])


def draw(scores_V: Scores, params: SamplingParams, position: int) -> int:
    """What the reference sampler draws, from one row and these scores alone."""
    assert params.greedy or params.seed is not None
    tables = SamplingTables.allocate(1, torch.device("cpu"))
    tables.temperature_R[0], tables.top_k_R[0] = params.temperature, params.top_k
    tables.top_p_R[0], tables.min_p_R[0] = params.top_p, params.min_p
    tables.seed_R2[0] = torch.from_numpy(np.asarray([params.seed or 0], dtype=np.uint64).view(np.int32))
    row, at = torch.zeros(1, dtype=torch.int32), torch.tensor([position], dtype=torch.int32)
    return int(choose(torch.tensor(scores_V)[None], row, at, tables, all_greedy=False)[0])


def weights_at(weights: Weights, place: int) -> int:
    """Those that what stands at this place comes from."""
    return next(key for begin, key in reversed(weights) if begin <= place)


def scores_after(tokens: Sequence[int], key: int = 0) -> Scores:
    """The model's scores after these tokens, not to be written to."""
    first = 1 + SHIFT * key
    terms = ((token + first) * weight % _PRIME for token, weight in zip(tokens, _WEIGHTS, strict=False))
    return _scores_of(sum(terms) % _PRIME)


@lru_cache(maxsize=50_000)
def _scores_of(prefix_hash: int) -> Scores:
    scores_V: Scores = logits_of(torch.tensor([prefix_hash]))[0].numpy()
    scores_V.setflags(write=False)
    return scores_V


def edited(
    scores_V: Scores, prompt: Sequence[int], answer: Sequence[int], params: SamplingParams, form: HashForm | None
) -> Scores:
    """The scores that the next token is drawn from, after all that the request asks of them, one token at a time."""
    scores = scores_V.copy()
    repetition, presence, frequency = (
        np.float32(each) for each in (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    )
    generated = Counter(answer)
    for token in {*prompt, *answer}:
        score = scores[token] * repetition if scores[token] < 0 else scores[token] / repetition
        if count := generated[token]:
            score = score - np.float32(count) * frequency - presence
        scores[token] = score
    for token, bias in params.logit_bias.items():
        scores[token] += np.float32(bias)
    for token in _banned(prompt, answer, params, form):
        scores[token] = -np.inf
    if "tilt" in params.processor_args:
        tokens = [*prompt, *answer]
        scores = Tilt.of(scores, params.processor_args["tilt"], len(tokens), tokens[-1])
    return scores


def _banned(prompt: Sequence[int], answer: Sequence[int], params: SamplingParams, form: HashForm | None) -> set[int]:
    tokens, everything = (*prompt, *answer), set(range(VOCAB))
    banned: set[int] = set()
    if form is None and len(answer) < params.min_tokens:
        banned |= stops_of(params)
    for word in params.bad_words:
        assert not isinstance(word, str)
        before, last = tuple(word[:-1]), word[-1]
        if not before or tokens[-len(before) :] == before:
            banned.add(last)
    if params.allowed_token_ids is not None:
        banned |= everything - set(params.allowed_token_ids)
    if form is not None:
        banned |= everything - form.allowed(answer)
    return banned


@lru_cache(maxsize=20_000)
def continuation(
    prompt: tuple[int, ...],
    params: SamplingParams,
    max_length: int,
    endings: tuple[tuple[int, ...], ...] = (),
    form: tuple[int, int, int] | None = None,
    weights: Weights = FIRST,
    choice: Choice = mix,
) -> tuple[int, ...]:
    """The answer to a prompt where the context ends at `max_length`, stop token included.

    A request that draws random numbers must bring its seed.
    """
    masks, stops, answer = form_of(form, params), stops_of(params), list[int]()
    plain = not (masks or params.bad_words or params.logit_bias or params.min_tokens or params.processor_args)
    plain &= params.allowed_token_ids is None and params.repetition_penalty == 1.0
    plain &= params.presence_penalty == params.frequency_penalty == 0.0
    while len(prompt) + len(answer) < _end(prompt, params, max_length):
        if masks is not None and len(answer) == masks.fails:
            break
        scores_V = scores_after((*prompt, *answer), weights_at(weights, len(answer)))
        if not plain:
            scores_V = edited(scores_V, prompt, answer, params, masks)
        answer.append(choice(scores_V, params, len(prompt) + len(answer)))
        if answer[-1] in stops or completed(endings, params, answer) is not None:
            break
    return tuple(answer)


def _end(prompt: Sequence[int], params: SamplingParams, max_length: int) -> int:
    return max_length if params.max_tokens is None else min(max_length, len(prompt) + params.max_tokens)


def completed(endings: tuple[tuple[int, ...], ...], params: SamplingParams, answer: Sequence[int]) -> int | None:
    """Which of these sequences ends the answer now."""
    if len(answer) < params.min_tokens:
        return None
    return Endings(endings).completes(np.asarray(answer, dtype=np.int32))


def answer(move: Move, limits: SchedulerLimits, choice: Choice = mix) -> list[int]:
    """What the request that this move adds gets, whatever else happens, computed with no engine."""
    length = limits.max_model_len
    return list(continuation(move.prompt, move.params, length, move.endings, move.form, move.weights, choice))


def answer_of_the_real_sampler(move: Move, limits: SchedulerLimits) -> list[int]:
    """The same with the reference sampler's random choice."""
    return answer(move, limits, draw)


def reason_of(move: Move, answer: Sequence[int], limits: SchedulerLimits) -> tuple[FinishReason, int | None]:
    """Why the request ends with this answer, and which of its endings it has."""
    if answer and answer[-1] in stops_of(move.params):
        return FinishReason.STOP, completed(move.endings, move.params, answer)
    if answer and (ending := completed(move.endings, move.params, answer)) is not None:
        return FinishReason.STOP, ending
    ends = len(move.prompt) + len(answer) >= _end(move.prompt, move.params, limits.max_model_len)
    return FinishReason.LENGTH if ends else FinishReason.ERROR, None


def fault_of_line(
    ids: Sequence[int],
    logprobs: Sequence[float],
    rank: int,
    prefix: Sequence[int],
    key: int,
    token: int,
    wanted: int | None,
) -> str | None:
    """What is wrong with a line of log probabilities of `token` after `prefix`, by these weights; None: nothing."""
    if wanted is None:
        empty = set(ids) == {-1} and set(logprobs) == {-math.inf} and rank == 0
        return None if empty else "there are some, and none were asked for"
    scores = scores_after(prefix, key).tolist()
    order = sorted(range(VOCAB), key=lambda each: (-scores[each], each))
    total = math.log(sum(math.exp(score) for score in scores))
    want = [token, *order[:wanted]]
    if list(ids) != want + [-1] * (len(ids) - len(want)):
        return f"tokens {list(ids[: len(want)])} in place of {want}"
    if rank != order.index(token) + 1:
        return f"rank {rank} in place of {order.index(token) + 1}"
    for got, each in zip(logprobs, want, strict=False):
        if not abs(got - (scores[each] - total)) <= TOLERANCE:
            return f"{got} for token {each} in place of {scores[each] - total}"
    return None
