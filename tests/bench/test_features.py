"""`gapless bench features` runs every case, and says what each row is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from cli.conftest import SHAPE
from gapless.bench.decode import Workload
from gapless.bench.features import SAME_PROMPT, FeatureBench, feature_params, measure
from gapless.config import EngineConfig
from gapless.errors import ConfigError
from gapless.text.detokenize import byte_alphabet

VOCAB = 128
WORK = Workload(requests=8, prompt_len=40, new_tokens=6)
CONFIG = EngineConfig(device="cpu", max_rows=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A shape, and a tokenizer that can spell ASCII."""
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "vocab_size": VOCAB}))
    spelled = {byte: character for character, byte in byte_alphabet().items()}
    vocab = {"<end>": 0, **{spelled[byte]: byte for byte in range(1, VOCAB)}}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<end>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_every_feature_is_measured_with_half_and_with_all_of_the_rows(folder: Path):
    report = measure(
        str(folder / "config.json"), WORK, CONFIG, [0, 1], tokenizer=folder, only=(), repeat=1, tell=lambda _: None
    )
    named = feature_params(VOCAB, 6, tokenizer=True)
    assert {"n, 4", "regex", "grammar", "prompt logprobs, 5", SAME_PROMPT, "JSON schema"} <= set(named)
    expected = {
        ("plain", 0.0),
        ("plain, no prefix cache", 0.0),
        *((name, share) for name in named for share in (0.5, 1)),
    }
    assert {(row.feature, row.share) for row in report.rows} == expected
    assert len(report.rows) == 2 * len(expected)
    assert all(row.tokens_per_second > 0 for row in report.rows)


def test_the_same_prompt_is_computed_once(folder: Path):
    from gapless.bench import features

    case: Callable[..., features._Case] = features._Case  # pyright: ignore[reportPrivateUsage]
    bench = FeatureBench(str(folder / "config.json"), WORK, CONFIG, None, prefix_cache=True)
    for share in (1.0, 0.5):
        bench.run(case(SAME_PROMPT, share, {}), 1)
    before = bench.random.engine.stats().scheduler
    bench.run(case(SAME_PROMPT, 0.5, {}), 1)
    after = bench.random.engine.stats().scheduler
    bench.close()
    assert after.prompt_tokens - before.prompt_tokens == 8 * 40
    assert after.cached_tokens - before.cached_tokens == 4 * 32


def test_a_feature_that_is_not_known_is_an_error(folder: Path):
    with pytest.raises(ConfigError, match="no feature is called 'nonsense'"):
        measure(
            str(folder / "config.json"),
            WORK,
            CONFIG,
            [1],
            tokenizer=None,
            only=("nonsense",),
            repeat=1,
            tell=lambda _: None,
        )
