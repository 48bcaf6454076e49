"""The import direction of docs/architecture.md, torch.cuda in one place, and host waits in two."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import gapless

ROOT = Path(gapless.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# What each room may import of this package, and whether it may import torch. Longest prefix wins.
BASICS = {"errors", "config", "params", "request", "plan", "outcome"}
BOOKS = BASICS | {"rows", "waiting"}
SCHEDULER = {"sequences", "scores", "planner", "scheduler"}
POLICY = BOOKS | SCHEDULER | {"blocks", "budget", "prefix", "stop_table"}
ENGINE = POLICY | {"device", "attention", "models", "sampling", "kernels", "engine", "logits_processor"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "params": {"errors", "grammar.spec"},
    "request": {"errors", "params"},
    "plan": {"errors", "request"},
    "outcome": {"request", "plan"},
    "blocks": BASICS,
    "budget": set(),
    "prefix": BASICS,
    "stop_table": BASICS,
    "waiting": BASICS,
    "rows": BASICS,
    "sequences": BOOKS | {"blocks", "prefix", "stop_table"},
    "scores": BOOKS,
    "planner": BOOKS | {"budget", "scores", "sequences"},
    "scheduler": BOOKS | {"planner", "scores", "sequences"},
    "grammar": {"errors", "grammar", "text"},
    "logits_processor": set(),
    "spans": set(),
    "device": {"errors", "device", "spans"},
    "kernels": {"errors", "kernels", "attention.base"},
    "attention": {"errors", "config", "attention", "kernels"},
    "models": {"errors", "config", "attention.base", "attention", "models", "kernels"},
    "sampling": {"errors", "sampling", "kernels"},
    "weights": {"errors", "config", "weights"},
    "text": {"errors", "text"},
    "engine": ENGINE,
    "outputs": BASICS,
    "turns": {"errors"},
    "trace": ENGINE | {"spans", "trace"},
}
ENGINE_LAYERS = [
    "sleep",
    "tables",
    "layout",
    "slots",
    "accesses",
    "graphs",
    "fill",
    "stage",
    "runner",
    "triton_runner",
    "masking",
    "loop",
    "admission",
    "core",
    "handle",
    "build",
]
NO_TORCH = POLICY | {"outputs", "spans", "grammar"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> list[str]:
    """Every module that a file imports, lazily or not."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path.name} imports relatively"
            names += [node.module] if node.module != "gapless" else [f"gapless.{a.name}" for a in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_in_the_agreed_direction(path: Path):
    module = module_of(path)
    room = module.split(".")[0]
    if room not in ALLOWED:
        return
    for name in imports_of(path):
        if name.startswith("gapless."):
            target = name.removeprefix("gapless.")
            allowed = any(target == room or target.startswith(room + ".") for room in ALLOWED[room])
            assert allowed or target.split(".")[0] == room, f"{module} must not import {name}"
        elif room in NO_TORCH:
            assert name.split(".")[0] not in {"torch", "triton", "transformers"}, f"{module} must not import {name}"


def test_inside_the_engine_later_layers_import_earlier_ones_only():
    for path in (ROOT / "engine").glob("*.py"):
        layer = path.stem
        if layer == "__init__":
            continue
        assert layer in ENGINE_LAYERS, f"engine/{layer}.py has no place in the order of layers"
        for name in imports_of(path):
            if name.startswith("gapless.engine."):
                target = name.split(".")[2]
                assert ENGINE_LAYERS.index(target) < ENGINE_LAYERS.index(layer), f"{layer} must not import {target}"


def test_every_room_below_the_front_ends_has_a_rule():
    rooms = {module_of(path).split(".")[0] for path in FILES} - {""}
    front = {"llm", "async_llm", "collector", "forms", "loading", "prompts", "progress", "cli", "bench", "demo"}
    front |= {"__main__", "server"}
    assert rooms - set(ALLOWED) <= front


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_torch_cuda_is_used_in_one_file_only(path: Path):
    if module_of(path) != "device.cuda":
        used = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
            and node.attr == "cuda"
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        ]
        assert not used, f"torch.cuda in {module_of(path)}, line {used[0].lineno}"


WAITS = re.compile(r"\.(synchronize|item|cpu|nonzero)\(|\.to\(.cpu.\)")
MAY_WAIT = {
    "device.cpu",
    "device.cuda",
    "device.null",
    "device.base",
    "device.sim.streams",
    "device.sim.device",
    "engine.sleep",  # copies weights to the host, inside run_now
    "engine.slots",
}
REFERENCES = {
    "attention.torch_reference",
    "sampling.torch_sampler",
    "sampling.torch_features",
    "sampling.torch_logprobs",
}  # the CPU's, which may look at their data
HOT_ROOMS = SCHEDULER | {
    "engine",
    "plan",
    "rows",
    "blocks",
    "budget",
    "device",
    "models",
    "attention",
    "sampling",
    "kernels",
    "trace",
}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_the_host_waits_for_the_device_in_the_device_and_the_slots_only(path: Path):
    module = module_of(path)
    if module.split(".")[0] in HOT_ROOMS and module not in MAY_WAIT | REFERENCES:
        found = WAITS.search(path.read_text())
        assert not found, f"{module} may wait for the device: {found}"


def test_the_core_runs_without_a_server_library():
    forbidden = {"fastapi", "uvicorn", "pydantic", "msgspec", "prometheus_client", "starlette"}
    for path in FILES:
        if module_of(path).split(".")[0] != "server":
            found = forbidden & {name.split(".")[0] for name in imports_of(path)}
            assert not found, f"{module_of(path)} imports {found}"


def test_nothing_unpickles_or_runs_remote_code():
    for path in FILES:
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert not {"pickle", "dill", "cloudpickle"} & {name.split(".")[0] for name in imports_of(path)}, path
        assert "trust_remote_code" not in text, path


SERVER_LIBRARIES = {
    "fastapi",
    "uvicorn",
    "starlette",
    "pydantic",
    "msgspec",
    "prometheus_client",
    "opentelemetry",
    "h11",
}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_server_libraries_and_the_server_are_imported_by_the_server_and_its_commands_alone(path: Path):
    module = module_of(path)
    if module.split(".")[0] != "server":
        names = imports_of(path)
        assert not {name.split(".")[0] for name in names} & SERVER_LIBRARIES
        if module.split(".")[0] != "cli":
            assert not [name for name in names if name.startswith("gapless.server")]


def test_no_file_imports_pickle():
    """Messages between processes, and weights, never can run code."""
    for path in FILES:
        names = {name.split(".")[0] for name in imports_of(path)}
        assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}, path
        assert "torch.load" not in path.read_text(), path
