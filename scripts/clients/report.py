"""What is kept of clients' reports."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from environments import ClientError

MOST_BYTES = 200 * 2**10
_CASES = re.compile(r"(\d+) generated, (\d+) passed")


def count_cases(out: str) -> int:
    """Requests of a run of schemathesis."""
    found = _CASES.search(out)
    return int(found[1]) if found else 0


def keep(full: Path, kept: Path, *, hidden: Mapping[str, str]) -> str:
    """Keep guidellm's report without single requests, with some texts replaced, and say what is in it.

    Raises ClientError if a request failed.
    """
    text = full.read_text()
    for private, shown in hidden.items():
        text = text.replace(json.dumps(private)[1:-1], shown)
    found = json.loads(text)
    for benchmark in found["benchmarks"]:
        benchmark.pop("requests", None)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found, indent=1) + "\n")
    if kept.stat().st_size > MOST_BYTES:
        kept.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    return _line(found["benchmarks"][0]["metrics"])


def _line(metrics: Mapping[str, Any]) -> str:
    requests = metrics["request_totals"]
    if requests["errored"] or not requests["successful"]:
        raise ClientError(f"of the requests {requests['errored']} failed, {requests['successful']} did not")
    first, between = (metrics[name]["successful"] for name in ("time_to_first_token_ms", "inter_token_latency_ms"))
    return (
        f"{requests['successful']} requests, {metrics['output_tokens_per_second']['total']['mean']:.1f} tokens/s; "
        f"first token {first['median']:.0f} ms, between two {between['median']:.0f} ms (medians)"
    )
