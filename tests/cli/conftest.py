"""A model folder without weights, and the program run in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from frontend.tiny import TEMPLATE, tiny_inner
from gapless.cli.main import main
from support.processes import killed_after

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 65536,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For --load random."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<end>"}))
    tiny_inner().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def options(model: Path) -> list[str]:
    """The tiny model, greedy, short and for ever."""
    return ["--model", str(model), "--load", "random", "--device", "cpu", "--num-blocks", "16K", "--temperature", "0"]


@dataclass(frozen=True)
class Ran:
    """How a run of the program ended."""

    status: int
    out: str
    err: str

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def gapless(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the program in this process."""

    def run(*argv: str) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(argv))
        captured = capfd.readouterr()
        code = ended.value.code
        return Ran(code if isinstance(code, int) else 1, captured.out, captured.err)

    return run


@pytest.fixture
def spawn() -> Generator[Callable[[Sequence[str]], subprocess.Popen[str]]]:
    """Run the program in a process of its own, with pipes."""

    def start(argv: Sequence[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", "from gapless.cli.main import main; main()", *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        return stack.enter_context(killed_after(process))

    with ExitStack() as stack:
        yield start
