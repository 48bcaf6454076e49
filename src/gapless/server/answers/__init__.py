"""From a model's text to the parts of an OpenAI answer: thoughts, content and calls of functions."""

from gapless.server.answers.dialects import dialect_of, reasoning_tag_of
from gapless.server.answers.parser import AnswerParser, Dialect
from gapless.server.answers.pieces import Content, Piece, Reasoning, ToolCallArguments, ToolCallBegin
from gapless.server.answers.plan import AnswerPlan, plan_answer

__all__ = [
    "AnswerParser",
    "AnswerPlan",
    "Content",
    "Dialect",
    "Piece",
    "Reasoning",
    "ToolCallArguments",
    "ToolCallBegin",
    "dialect_of",
    "plan_answer",
    "reasoning_tag_of",
]
