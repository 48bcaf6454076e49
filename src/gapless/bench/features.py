"""What the features of a request cost: the same decode with none, half and all of the rows using one.

Random weights, fixed lengths, the runs of all cases alternate in one process. The prompts of no two runs are the same,
so that the prefix cache, which is on, finds nothing, but for the case that measures what it finds; `plain` is measured
without it, too, on an engine of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from gapless.bench.decode import Workload
from gapless.bench.environment import environment
from gapless.bench.random_engine import RandomEngine
from gapless.config import EngineConfig
from gapless.errors import ConfigError, InternalError
from gapless.logits_processor import ProcessedStep
from gapless.params import SamplingParams

PLAIN: Final = "plain"
SHARES: Final = (0.5, 1.0)
NUMBERS: Final = '{"type":"array","items":{"type":"integer"},"minItems":100000}'
"""A JSON schema that random tokens can walk for as long as one likes; so can they these two."""
REGEX: Final = "([0-9]+[ ,.])+"
GRAMMAR: Final = 'start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,9}/'
CONTINUATIONS: Final = 4
SAME_PROMPT: Final = "same prompt"


class Tilt:
    """An example of a logits processor: scores of higher token ids get less, by the row's argument."""

    name = "tilt"

    def __call__(self, logits_EV: Tensor, step: ProcessedStep) -> Tensor:
        ramp_V = logits_EV.new_ones(logits_EV.shape[1]).cumsum(0) / logits_EV.shape[1]
        return logits_EV.sub_(ramp_V * step.arguments_E[:, None])


def feature_params(vocab: int, new_tokens: int, *, tokenizer: bool) -> dict[str, dict[str, Any]]:
    """What each feature puts into SamplingParams. Without a tokenizer those that need text are left out."""
    some = range(0, vocab, max(1, vocab // 64))
    found: dict[str, dict[str, Any]] = {
        "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2},
        "bias and bans": {
            "logit_bias": dict.fromkeys(some, -5.0),
            "bad_words": [[token, token + 1] for token in some[:-1]],
            "min_tokens": new_tokens,
        },
        "allowed tokens": {"allowed_token_ids": tuple(range(0, vocab, 3))},
        "logprobs, 5": {"logprobs": 5},
        "prompt logprobs, 5": {"prompt_logprobs": 5},
        "n, 4": {"n": CONTINUATIONS, "seed": 1},
        SAME_PROMPT: {},
        "processor": {"processor_args": {Tilt.name: 0.5}},
    }
    if tokenizer:
        found["stop strings"] = {"stop": ["\n\nEND", "</answer>", "Observation:"]}
        long = {"ignore_eos": False, "min_tokens": new_tokens}
        found["JSON schema"] = {"json_schema": NUMBERS, **long}
        found["regex"] = {"regex": REGEX, **long}
        found["grammar"] = {"grammar": GRAMMAR, **long}
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureRow:
    """One case. Rates are medians in generated tokens per second; ratio: over plain at the same lookahead."""

    feature: str
    share: float  # of the requests that use it
    lookahead: int
    tokens_per_second: float
    ratio: float
    seconds: list[float]


@dataclass(frozen=True, slots=True)
class FeatureReport:
    """What `gapless bench features --json` prints last."""

    workload: Workload
    environment: dict[str, str]
    rows: list[FeatureRow]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Case:
    feature: str
    share: float
    changes: dict[str, Any]


class FeatureBench:
    """An engine with the memory for a workload, whose requests all run at once."""

    def __init__(
        self,
        shape: str,
        workload: Workload,
        config: EngineConfig,
        tokenizer: Path | None,
        *,
        prefix_cache: bool,
        temperature: float = 0.0,
    ) -> None:
        """tokenizer: a folder; temperature: of all requests. Raises ConfigError, OutOfMemoryError."""
        length = workload.prompt_len + workload.new_tokens
        blocks = workload.requests * -(-length // config.block_size)
        sized = replace(config, num_blocks=blocks, max_model_len=length, prefix_cache=prefix_cache)
        self.workload = workload
        self._temperature = temperature
        self.random = RandomEngine(shape, sized, tokenizer=tokenizer, processors=(Tilt(),))
        self._runs = 0

    def run(self, case: _Case, lookahead: int) -> float:
        """Seconds that all requests took."""
        work, random = self.workload, self.random
        random.engine.set_lookahead(lookahead)
        plain = SamplingParams(temperature=self._temperature, max_tokens=work.new_tokens, ignore_eos=True)
        featured = replace(plain, **case.changes)
        many = round(case.share * work.requests)
        many -= many % featured.n
        params = [featured] * (many // featured.n) + [plain] * (work.requests - many)
        self._runs += 1
        prompts = random.random_prompts([work.prompt_len] * len(params), seed=self._runs)
        if case.feature == SAME_PROMPT:
            prompts[:many] = random.random_prompts([work.prompt_len]) * many
        requests = random.prepare(prompts, params)
        begin = time.perf_counter()
        generated = random.generate(requests)
        seconds = time.perf_counter() - begin
        tokens = sum(each.size for each in generated.tokens)
        if tokens != work.requests * work.new_tokens:
            raise InternalError(f"{case.feature}: {tokens} tokens came, not {work.requests * work.new_tokens}")
        return seconds

    def close(self) -> None:
        self.random.close()


def measure(
    shape: str,
    workload: Workload,
    config: EngineConfig,
    lookaheads: Sequence[int],
    *,
    tokenizer: Path | None,
    only: Sequence[str],
    repeat: int,
    temperature: float = 0.0,
    tell: Callable[[str], None],
) -> FeatureReport:
    """All features, or those in `only`, at every lookahead. Raises ConfigError for one that is not known."""
    tell("plain, no prefix cache")
    with closing(
        FeatureBench(shape, workload, config, tokenizer, prefix_cache=False, temperature=temperature)
    ) as bench:
        uncached = {lookahead: _timed(bench, _PLAIN_CASE, lookahead, repeat) for lookahead in lookaheads}
    with closing(FeatureBench(shape, workload, config, tokenizer, prefix_cache=True, temperature=temperature)) as bench:
        known = feature_params(bench.random.model.vocab_size, workload.new_tokens, tokenizer=tokenizer is not None)
        if unknown := [name for name in only if name not in known]:
            raise ConfigError(f"no feature is called {unknown[0]!r}; there are {', '.join(known)}")
        cases = [_PLAIN_CASE]
        cases += [_Case(name, share, known[name]) for name in known if not only or name in only for share in SHARES]
        for case in cases:
            tell(f"warm-up: {case.feature}")
            bench.run(case, lookaheads[-1])
        seconds: dict[tuple[int, int], list[float]] = {}
        for number in range(1, repeat + 1):
            tell(f"round {number} of {repeat}")
            for index, case in enumerate(cases):
                for lookahead in lookaheads:
                    seconds.setdefault((index, lookahead), []).append(bench.run(case, lookahead))
        facts = environment(bench.random.device_name, bench.random.torch_device)
    tokens = workload.requests * workload.new_tokens
    rows: list[FeatureRow] = []
    for lookahead in lookaheads:
        base = statistics.median(seconds[0, lookahead])
        timed = [(replace(_PLAIN_CASE, feature="plain, no prefix cache"), uncached[lookahead])]
        timed += [(case, seconds[index, lookahead]) for index, case in enumerate(cases)]
        for case, times in timed:
            median = statistics.median(times)
            rows.append(
                FeatureRow(
                    feature=case.feature,
                    share=case.share,
                    lookahead=lookahead,
                    tokens_per_second=tokens / median,
                    ratio=base / median,
                    seconds=times,
                )
            )
    return FeatureReport(workload, facts, rows)


_PLAIN_CASE: Final = _Case(PLAIN, 0.0, {})


def _timed(bench: FeatureBench, case: _Case, lookahead: int, repeat: int) -> list[float]:
    bench.run(case, lookahead)
    return [bench.run(case, lookahead) for _ in range(repeat)]
