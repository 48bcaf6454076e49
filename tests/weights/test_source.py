"""From what a user calls a model to a folder and its weights."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gapless.errors import ConfigError, CorruptModelError, ModelNotFoundError, UnsupportedModelError
from gapless.weights.hf_config import SHAPES
from gapless.weights.source import ModelSource, open_weights, resolve_model
from weights.tiny import CONFIG, tensors, with_fields, write_folder, write_gguf


def test_a_folder_gives_its_config_and_its_weights(tmp_path: Path):
    made = write_folder(tmp_path / "my-model")
    source = resolve_model(tmp_path / "my-model")
    assert (source.name, source.folder, source.config.num_layers) == ("my-model", tmp_path / "my-model", 2)
    found = dict(open_weights(source))
    assert found.keys() == made.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in made.items())


def test_a_gguf_file_gives_the_same_names_as_a_folder(tmp_path: Path):
    write_gguf(tmp_path / "some.Q8.gguf")
    source = resolve_model(str(tmp_path / "some.Q8.gguf"))
    assert source.name == "some.Q8"
    assert dict(open_weights(source)).keys() == tensors(CONFIG).keys()


def test_old_rotary_tables_and_the_head_of_a_tied_model_are_left_out(tmp_path: Path):
    made = write_folder(tmp_path)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32), "lm_head.weight": torch.ones(288, 256)}
    save_file(made | more, str(tmp_path / "model.safetensors"))
    assert dict(open_weights(resolve_model(tmp_path))).keys() == made.keys()


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path):
    made = write_folder(tmp_path)
    path = str(tmp_path / "model.safetensors")
    source = resolve_model(tmp_path)
    save_file({name: tensor for name, tensor in made.items() if name != "model.norm.weight"}, path)
    with pytest.raises(CorruptModelError, match=r"missing, the first is model\.norm\.weight"):
        list(open_weights(source))
    save_file(made | {"model.layers.0.self_attn.q_proj.scale": torch.ones(1)}, path)
    with pytest.raises(UnsupportedModelError, match=r"q_proj\.scale"):
        list(open_weights(source))
    save_file(made | {"model.norm.weight": torch.ones(255)}, path)
    with pytest.raises(CorruptModelError, match=r"model\.norm\.weight has the shape \[255\]"):
        list(open_weights(source))


def test_an_untied_model_needs_its_head(tmp_path: Path):
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(with_fields(tie_word_embeddings=False)))
    with pytest.raises(CorruptModelError, match=r"lm_head\.weight"):
        list(open_weights(resolve_model(tmp_path)))


def test_a_shape_has_no_weights():
    with pytest.raises(ConfigError, match="random"):
        open_weights(ModelSource(config=SHAPES["llama-8b"], name="llama-8b", folder=None))


@pytest.mark.parametrize("name", ["./nope", "/nope/model", "~/nope", "nope.gguf", "a/b/c", "a\\b", "../x", "."])
def test_what_looks_like_a_path_and_is_missing_is_not_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"no such file|no config\.json"):
        resolve_model(name)


def test_a_file_that_is_no_model_and_an_empty_name_are_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelNotFoundError, match="neither a folder nor"):
        resolve_model(tmp_path / "notes.txt")
    with pytest.raises(ModelNotFoundError, match="no name"):
        resolve_model("")


def test_a_folder_with_only_a_gguf_file_says_which_file_to_give(tmp_path: Path):
    write_gguf(tmp_path / "m.gguf")
    with pytest.raises(ModelNotFoundError, match=r"give .*m\.gguf"):
        resolve_model(tmp_path)


def test_demo_is_the_installed_smollm2(smollm_gguf: Path, smollm_folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert smollm_gguf.exists()
    monkeypatch.setenv("GAPLESS_CACHE", str(smollm_folder.parent.parent))
    source = resolve_model("demo")
    assert source.folder == smollm_folder
    assert source.name == "SmolLM2-135M-Instruct"
    assert source.config == replace(SHAPES["smollm2-135m"], dtype="float32")


HUB_SCRIPT = """
import sys
calls = []
sys.addaudithook(lambda event, args: calls.append(event) if event in ("socket.connect", "socket.getaddrinfo") else None)
from gapless.errors import ModelNotFoundError
from gapless.weights.source import resolve_model

print(resolve_model(sys.argv[1]).name)
assert "huggingface_hub" not in sys.modules, "a local folder needs no hub"
print(resolve_model("org/cached").name, sorted(p.name for p in resolve_model("org/cached").folder.iterdir()))
for missing in ("org/missing", "gone", "a model!", "x" * 200):
    try:
        resolve_model(missing)
    except ModelNotFoundError as error:
        print(error)
assert not calls, calls
"""


def test_hub_ids_come_from_the_cache_offline_and_a_local_folder_never_needs_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_folder(tmp_path / "local")
    repository = tmp_path / "home" / "hub" / "models--org--cached"
    write_folder(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    command = [sys.executable, "-c", HUB_SCRIPT, str(tmp_path / "local")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "local"
    assert lines[1] == "org/cached ['config.json', 'model.safetensors']"
    assert "can not be reached" in lines[2]
    assert "can not be reached" in lines[3]
    assert "no hub id" in lines[4]
    assert "no hub id" in lines[5]
    assert "Traceback" not in done.stdout
