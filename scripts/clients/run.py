"""Runs clients against `gapless serve`, each in a virtual environment of its own under .clients/.

python scripts/clients/run.py [--installable] [openai] [schemathesis] [lm-eval] [guidellm]      (all without a name)

Prints a line for each, and ends with status 1 if one failed; with --installable what pip's index does not have is left
out, but not all of it. docs/clients.md says what each of them checks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import report
from environments import CLIENTS, HERE, ROOT, ClientError, NotInstalledError, environment, variables
from serving import KEY, ServingError, serving

from gapless.errors import GaplessError
from gapless.weights.source import resolve_model

MODEL = "SmolLM2-135M-Instruct"
REPORT = ROOT / "docs" / "clients" / "guidellm.json"
GUIDELLM_SECONDS = 30
CLIENT_SECONDS = 600.0
FUZZED_LENGTH = 44  # tokens of prompt and answer: generated requests often ask for as many as there can be
FUZZ_EXAMPLES = 12
FUZZ_PARTS = (  # run side by side, as what takes long is to make up requests
    ("--include-path", "/v1/chat/completions"),
    ("--include-path", "/v1/completions"),
    ("--include-path", "/v1/responses"),
    ("--exclude-path-regex", "^/v1/(chat/completions|completions|responses)$"),
)


class Servers:
    """The demo model, served once for all clients."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    @cached_property
    def demo(self) -> str:
        return self._stack.enter_context(serving("--model", "demo"))

    @cached_property
    def folder(self) -> Path:
        """Of the demo's tokenizer and weights. The server has converted them."""
        _ = self.demo
        folder = resolve_model("demo").folder
        assert folder is not None
        return folder


def openai(servers: Servers) -> str:
    """Calls of the `openai` package."""
    python = environment("openai") / "python"
    out = _run([python, HERE / "openai_calls.py"], GAPLESS_URL=servers.demo, GAPLESS_KEY=KEY)
    return out.splitlines()[-1]


def schemathesis(servers: Servers) -> str:
    """Requests made up from the schema: against one layer of random numbers, for the answers' text is not looked at."""
    program = environment("schemathesis") / "schemathesis"
    shape = CLIENTS / "one-layer.json"
    config = json.loads((servers.folder / "config.json").read_text())
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
    shape.write_text(json.dumps({**config, **small, "num_attention_heads": 2, "num_key_value_heads": 1}))
    random = ["--load", "random", "--shape", str(shape), "--tokenizer", str(servers.folder)]
    with serving(*random, "--served-model-name", MODEL, "--max-model-len", str(FUZZED_LENGTH)) as url:
        running = [_fuzz(program, url, part) for part in FUZZ_PARTS]
        outs = [each.communicate(timeout=CLIENT_SECONDS)[0] for each in running]
    failed = [out for each, out in zip(running, outs, strict=True) if each.returncode != 0]
    if failed:
        raise ClientError("\n".join(failed))
    return f"{sum(map(report.count_cases, outs))} requests made up from the schema: every answer is as documented"


def _fuzz(program: Path, url: str, part: Sequence[str]) -> subprocess.Popen[str]:
    options = ["--checks", "all", "--exclude-checks", "positive_data_acceptance", "--phases", "coverage,fuzzing"]
    options += ["--max-examples", str(FUZZ_EXAMPLES), "--generation-deterministic", "--continue-on-failure"]
    options += ["--no-color", "--warnings", "off", "--request-timeout", "60", "-H", f"Authorization: Bearer {KEY}"]
    return subprocess.Popen(
        [str(program), "run", f"{url}/openapi.json", *options, *part],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=CLIENTS,
        env=variables(),
    )


def lm_eval(servers: Servers) -> str:
    """`local-completions` on a task of our own, with prompts as token ids and as text."""
    program = environment("lm-eval") / "lm_eval"
    with tempfile.TemporaryDirectory() as folder:
        task = (HERE / "lm_eval" / "capitals.yaml").read_text().replace("ITEMS", str(HERE / "lm_eval" / "items.jsonl"))
        (Path(folder) / "capitals.yaml").write_text(task)
        outputs = [Path(folder) / "ids", Path(folder) / "text"]
        for output in outputs:
            arguments = f"base_url={servers.demo}/v1/completions,model={MODEL},tokenizer={servers.folder}"
            arguments += f",tokenizer_backend=huggingface,tokenized_requests={output.name == 'ids'},num_concurrent=4"
            command = [program, "run", "--model", "local-completions", "--model_args", arguments, "--tasks", "capitals"]
            command += ["--include_path", folder, "--output_path", output, "--log_samples"]
            _run(command, OPENAI_API_KEY=KEY)
        out = _run([sys.executable, HERE / "reference.py", *outputs], TQDM_DISABLE="1")
    return "; ".join(out.splitlines()[-len(outputs) :])


def guidellm(servers: Servers) -> str:
    """Four streams of made up texts for half a minute."""
    program = environment("guidellm") / "guidellm"
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder) / "report.json"
        backend = f"kind=openai_http,target={servers.demo},api_key={KEY},model={MODEL}"
        command = [program, "run", "--backend", backend, "--profile", "kind=concurrent,streams=4"]
        command += ["--constraint", f"kind=max_duration,seconds={GUIDELLM_SECONDS}"]
        command += ["--tokenizer", f"kind=hf_auto,model={servers.folder}", "--disable-progress"]
        command += ["--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=32"]
        _run([*command, "--output", f"kind=json,path={full}"])
        return report.keep(full, REPORT, hidden={str(servers.folder): "MODEL", str(full): "report.json"})


def _run(command: Sequence[str | Path], **more: str) -> str:
    """What it prints. Raises ClientError if it fails."""
    done = subprocess.run(
        [str(each) for each in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=CLIENTS,
        env=variables(**more),
        timeout=CLIENT_SECONDS,
    )
    if done.returncode != 0:
        raise ClientError(done.stdout)
    return done.stdout


ALL: dict[str, Callable[[Servers], str]] = {
    "openai": openai,
    "schemathesis": schemathesis,
    "lm-eval": lm_eval,
    "guidellm": guidellm,
}


def main(names: Sequence[str]) -> int:
    """The exit status."""
    leaves_out, names = "--installable" in names, [name for name in names if name != "--installable"]
    if unknown := [name for name in names if name not in ALL]:
        print(f"there is no client {unknown[0]}; there are {', '.join(ALL)}", file=sys.stderr)
        return 2
    failures = left_out = 0
    try:
        with ExitStack() as stack:
            servers = Servers(stack)
            for name in names or ALL:
                start = time.monotonic()
                try:
                    said = ALL[name](servers)
                except (ClientError, ServingError, subprocess.SubprocessError) as error:
                    passed_over = leaves_out and isinstance(error, NotInstalledError)
                    said = f"LEFT OUT: {error}" if passed_over else f"FAILED\n{error}"
                    left_out += passed_over
                    failures += not passed_over
                print(f"{name:13} {time.monotonic() - start:5.0f} s  {said}", flush=True)
    except (ServingError, GaplessError) as error:
        print(f"FAILED: {error}")
        return 1
    if left_out == len(names or ALL):
        print("FAILED: no client could be installed")
        return 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
