"""Greedy answers at every lookahead, each token against transformers' logits of its place.

transformers' logits for a whole sequence come from one forward pass. A greedy answer is right if each of its tokens is
the likeliest once something independent, transformers' own where it has it, has changed the logits of its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from gapless import LLM, RequestOutput, SamplingParams
from gapless.outputs import TokenLogprob
from support.oracle import NEAR_TIE

LOOKAHEADS = (0, 1, 2)
Logits = Callable[[tuple[int, ...]], Tensor]  # [T, V] of T tokens
Edit = Callable[[Tensor, Tensor], Tensor]  # of the ids so far [1, T] and their scores [1, V]


def answers(llm: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[RequestOutput]:
    """The same at every lookahead."""
    found: list[list[RequestOutput]] = []
    for lookahead in LOOKAHEADS:
        llm.loaded.engine.set_lookahead(lookahead)
        found.append(llm.generate(prompts, params, use_tqdm=False))
    said = [[(each.text, each.token_ids) for output in outputs for each in output.outputs] for outputs in found]
    assert said[0] == said[1] == said[2]
    for outputs in (found[0], found[2]):
        for output, other in zip(outputs, found[1], strict=True):
            check_alike(logprobs_of(output), logprobs_of(other))
    return found[1]


def logprobs_of(output: RequestOutput) -> list[TokenLogprob | None]:
    """Of the prompt and of all its answers."""
    found = list(output.prompt_logprobs or ())
    return found + [token for each in output.outputs for token in each.logprobs or ()]


def check_alike(found: Sequence[TokenLogprob | None], others: Sequence[TokenLogprob | None]) -> None:
    """The same tokens; numbers may differ by what the size of a step makes of rounding."""
    for one, other in zip(found, others, strict=True):
        if one is None or other is None:
            assert one is other
            continue
        assert one.token_id == other.token_id
        assert one.rank == other.rank
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [logprob for _, logprob in one.top] == pytest.approx([logprob for _, logprob in other.top], abs=1e-3)


def check_greedy(outputs: Sequence[RequestOutput], logits: Logits, edits: Sequence[Edit]) -> int:
    """How many tokens differ from what the plain model says is likeliest."""
    changed = 0
    for output, edit in zip(outputs, edits, strict=True):
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        all_TV = logits(tuple(tokens))
        for at in range(len(output.prompt_token_ids), len(tokens)):
            scores_V = edit(torch.tensor([tokens[:at]]), all_TV[at - 1 : at].clone())[0]
            assert scores_V.max() - scores_V[tokens[at]] < NEAR_TIE
            changed += int(all_TV[at - 1].argmax()) != tokens[at]
    return changed
