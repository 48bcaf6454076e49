"""Prompts that were typed on the command line: through the chat template or not, printed or written."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing

from gapless.cli.files import ResultWriter, first_error
from gapless.cli.setup import warn
from gapless.collector import Prepared
from gapless.errors import ConfigError, InvalidRequestError
from gapless.llm import LLM
from gapless.outputs import RequestOutput
from gapless.params import SamplingParams
from gapless.prompts import ChatPrompt, Prompt


def to_prompts(llm: LLM, texts: Sequence[str], chat: bool | None) -> list[Prompt]:
    """Each text as a user's turn or as it is; None decides by whether the model has a template. Raises ConfigError."""
    if chat and not llm.loaded.has_chat_template:
        raise ConfigError(f"{llm.loaded.model_name} has no chat template: leave --chat out")
    if llm.loaded.has_chat_template if chat is None else chat:
        # an empty text stays as it is, to be refused, where a template would make something of it
        return [ChatPrompt(messages=[{"role": "user", "content": text}]) if text.strip() else "" for text in texts]
    return list(texts)


def print_answers(llm: LLM, texts: Sequence[str], prompts: Sequence[Prompt], params: SamplingParams) -> int:
    """One answer as it comes; several in the order of the prompts, each under its prompt. Returns the failures."""
    if len(prompts) == params.n == 1:
        return _print_one(llm, prompts[0], params)
    waiting: dict[int, str] = {}
    following = failures = 0
    for place, result in _answers(llm, prompts, params):
        failures += _warn_of(place, result)
        if isinstance(result, InvalidRequestError):
            waiting[place] = ""
        else:
            waiting[place] = f"> {texts[place]}\n{_shown(result)}\n\n"
        while following in waiting:
            _print(waiting.pop(following))
            following += 1
    return failures


def _print_one(llm: LLM, prompt: Prompt, params: SamplingParams) -> int:
    error: str | None = None
    with closing(llm.stream(prompt, params)) as deltas:
        for delta in deltas:
            _print(delta.text)
            error = delta.error
    _print("\n")
    if error is not None:
        warn(f"error: {error}")
    return int(error is not None)


def _shown(output: RequestOutput) -> str:
    """An answer as it is, several with their numbers."""
    if len(output.outputs) == 1:
        return output.outputs[0].text
    return "\n".join(f"[{each.index + 1}] {each.text}" for each in output.outputs)


def write_answers(llm: LLM, prompts: Sequence[Prompt], params: SamplingParams, writer: ResultWriter) -> int:
    """A line of JSON for each, as they finish. Returns the failures."""
    failures = 0
    for place, result in _answers(llm, prompts, params):
        if isinstance(result, InvalidRequestError):
            writer.error(place, None, None, str(result))
        else:
            writer.result(place, None, result)
        failures += _warn_of(place, result)
    return failures


def _warn_of(place: int, result: RequestOutput | InvalidRequestError) -> bool:
    """Whether it failed, and then a line about it."""
    error = str(result) if isinstance(result, InvalidRequestError) else first_error(result)
    if error is not None:
        warn(f"error: prompt {place + 1}: {error}")
    return error is not None


def _answers(
    llm: LLM, prompts: Sequence[Prompt], params: SamplingParams
) -> Iterator[tuple[int, RequestOutput | InvalidRequestError]]:
    """What became of each prompt: those that are refused first, then the others as they finish."""
    places: dict[str, int] = {}
    accepted: list[Prepared] = []
    for place, prompt in enumerate(prompts):
        try:
            prepared = llm.prepare(prompt, params)
        except InvalidRequestError as error:
            yield place, error
        else:
            places[str(prepared.request_id)] = place
            accepted.append(prepared)
    with closing(llm.run(accepted)) as outputs:
        for output in outputs:
            yield places[output.request_id], output


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
