"""From a model's name to an engine: random weights, shapes, tokenizers, refusals."""

import json
from pathlib import Path

import pytest

from frontend.tiny import tiny_inner
from gapless import LLM, SamplingParams
from gapless.demo import load_prompts
from gapless.errors import ConfigError, InvalidRequestError, ModelNotFoundError

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    tiny_inner().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_shape_runs_on_random_weights_and_takes_token_ids(folder: Path):
    with LLM(load="random", shape=folder / "config.json", device="cpu", num_blocks=64) as llm:
        (output,) = llm.generate([[1, 2, 3]], GREEDY)
        assert len(output.outputs[0].token_ids) == 5
        assert output.outputs[0].text == ""
        with pytest.raises(InvalidRequestError, match="without a tokenizer"):
            llm.generate("abc", GREEDY)
        with pytest.raises(InvalidRequestError, match="without a tokenizer"):
            llm.chat([{"role": "user", "content": "abc"}], GREEDY)


def test_a_shape_takes_text_with_a_tokenizer_of_its_own(folder: Path):
    with LLM(load="random", shape=folder, tokenizer=folder, device="cpu", num_blocks=64) as llm:
        assert llm.generate("abc", GREEDY)[0].prompt_token_ids == [1, 2, 3]
        with pytest.raises(InvalidRequestError, match="no chat template"):
            llm.chat([{"role": "user", "content": "abc"}], GREEDY)


def test_the_same_folder_gives_the_same_random_model(folder: Path):
    found: list[list[int]] = []
    for lookahead in (0, 1):
        with LLM(folder, load="random", device="cpu", num_blocks=64, lookahead=lookahead) as llm:
            found.append(llm.generate("abc", GREEDY)[0].outputs[0].token_ids)
            assert (llm.loaded.config.dtype, llm.loaded.config.device) == ("float32", "cpu")
    assert found[0] == found[1]


def test_wrong_ways_to_load_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="load must be auto or random"):
        LLM(folder, load="dummy")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="goes with load='random'"):
        LLM(shape="llama-1b")
    with pytest.raises(ConfigError, match=r"neither a config\.json nor the name of a shape"):
        LLM(load="random", shape="llama-9b")
    with pytest.raises(ModelNotFoundError):
        LLM(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"folder with a tokenizer\.json"):
        LLM(folder, load="random", tokenizer=tmp_path / "nothing", device="cpu")
    with pytest.raises(ConfigError, match="context limit"):
        LLM(folder, load="random", device="cpu", max_model_len=512)


def test_the_demo_brings_enough_prompts_of_mixed_lengths():
    lengths = sorted(len(prompt.split()) for prompt in load_prompts())
    assert len(lengths) >= 40
    assert lengths[0] <= 6
    assert lengths[-1] >= 300
    assert len(set(load_prompts())) == len(lengths)
