"""The parts of an answer, in the order in which the model writes them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """What the user is to read."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thought before."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallBegin:
    """A call of a function. `index` counts the answer's calls from 0."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of a call's arguments, which are a JSON object once they are complete."""

    index: int
    text: str


Piece = Content | Reasoning | ToolCallBegin | ToolCallArguments
