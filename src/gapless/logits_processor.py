"""Code of your own between the model's scores and the choice of a token, for all rows of a step at once.

class NoRepeat:
    name = "no_repeat"

    def __call__(self, logits_EV: Tensor, step: ProcessedStep) -> Tensor:
        return logits_EV.scatter(1, step.last_tokens_E[:, None].long(), -torch.inf)

llm = LLM("demo", logits_processors=[NoRepeat()])
llm.generate(prompt, SamplingParams(processor_args={"no_repeat": 1.0}))

A processor runs on the device, on the engine's thread, for steps that have a row with an argument of its name; the
result counts for these rows alone. Such a step samples without a graph: some 0.1 to 0.2 ms more of the host's time,
which lookahead hides behind the forward. A processor that waits for the device (`.item()`, `.cpu()`, indexing by a
mask) is right, too, and takes the overlap away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ProcessedStep:
    """What a processor may look at. E entries; padding and rows without an argument stand among them.

    arguments_E    float32: the row's argument for this processor, NaN without one
    positions_E    int32: the position, in prompt and answer together, of the token that is being chosen
    last_tokens_E  int32: the token before it
    """

    arguments_E: Tensor
    positions_E: Tensor
    last_tokens_E: Tensor


class LogitsProcessor(Protocol):
    """A name for processor_args, and a function from scores to scores.

    logits_EV  float32, after penalties, bias, bans and masks, before temperature; it may be written to, and returned.

    What is banned or masked stays so, and a row that a processor leaves without a token is sampled from what it had
    before. What it raises ends the engine.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, logits_EV: Tensor, step: ProcessedStep) -> Tensor: ...
