"""The server under scripts/load.py and scripts/http_cost.py: its processes, their memory, CPU time and counters."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

START_SECONDS = 300.0
_RUN = [sys.executable, "-c", "from gapless.cli.main import main; main()", "serve"]
_TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """`gapless serve` on a free port, or one that runs elsewhere, at `url`."""

    def __init__(self, argv: list[str], *, key: str, url: str | None = None) -> None:
        self.key = key
        self.process: subprocess.Popen[str] | None = None
        self.log: list[str] = []
        self.defects: list[str] = []
        self.own_refusals = 0  # of what is asked here, which the server counts, too
        if url is None:
            keys = ["--api-key", key] if key else []
            self.process = subprocess.Popen(
                [*_RUN, *argv, *keys, "--port", "0"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            threading.Thread(target=self._read, daemon=True).start()
        self.host, self.port = self._address(url)

    def _read(self) -> None:
        assert self.process is not None
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            del self.log[:-2000]
            if "Traceback" in line or " failed" in line:
                self.defects.append(line)

    def _address(self, url: str | None) -> tuple[str, int]:
        until = time.monotonic() + START_SECONDS
        while url is None:
            found = [each[0] for line in list(self.log) if (each := re.findall(r"listening at (http\S+?);", line))]
            url = found[0] if found else None
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > until:
                raise SystemExit("the server did not start:\n" + "".join(self.log))
            time.sleep(0.05)
        host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
        return host, int(port)

    def get(self, path: str, timeout: float = 30.0) -> tuple[int, str]:
        """Status and body."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request("GET", path, headers={"authorization": f"Bearer {self.key}"} if self.key else {})
            answer = connection.getresponse()
            self.own_refusals += answer.status >= 400 and path not in ("/health", "/ready")
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def wait_ready(self) -> float:
        """Seconds that it took."""
        begin = time.monotonic()
        while self.get("/ready")[0] != 200:
            if time.monotonic() - begin > START_SECONDS or (self.process and self.process.poll() is not None):
                raise SystemExit("the server does not get ready:\n" + "".join(self.log))
            time.sleep(0.05)
        return time.monotonic() - begin

    def stats(self) -> dict[str, Any]:
        """/debug/stats, empty without an engine."""
        status, text = self.get("/debug/stats")
        return json.loads(text) if status == 200 else {}

    def counts(self, name: str, label: str) -> dict[str, int]:
        """A counter of /metrics by one of its labels."""
        found = re.findall(rf'^{name}_total{{.*?{label}="(\w+)".*?}} (\S+)$', self.get("/metrics")[1], re.MULTILINE)
        return {value: int(float(count)) for value, count in found}

    def engine_pid(self) -> int | None:
        """Of the child that runs the engine."""
        if self.process is None:
            return None
        for file in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in file.read_text().split():
                if "gapless.server.engine_process" in _read_text(f"/proc/{pid}/cmdline"):
                    return int(pid)
        return None

    def stop(self) -> str:
        """End it as a user would. Returns what it logged last."""
        if self.process is None:
            return ""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return "".join(self.log[-20:])


def rss_mib(pid: int | None) -> float | None:
    """Resident memory."""
    found = re.search(r"^VmRSS:\s+(\d+)", _read_text(f"/proc/{pid}/status"), re.MULTILINE)
    return int(found[1]) / 1024 if found else None


def cpu_seconds(pid: int | None) -> float:
    """User and system time of a process so far."""
    fields = _read_text(f"/proc/{pid}/stat").rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def tiny_folder() -> str:
    """A model of one narrow layer, for --load random: what it computes costs next to nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = Path(tempfile.mkdtemp(prefix="gapless-tiny-"))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{letter: place for place, letter in enumerate(letters, 1)}}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<end>"])
    inner.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "<end>"}))
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(shape))
    return str(folder)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
