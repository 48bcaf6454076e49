"""What a request's tools ask of the answer: what the template is to show, what form it has, how it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gapless.server.answers.forms import calls_form
from gapless.server.answers.parser import AnswerParser, Dialect
from gapless.server.answers.tools import Choice, Tool, read_choice, read_tools


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """How one request's answers are made and read.

    template_tools  for the chat template; None: it is to show none.
    callable_tools  those that may be called.
    choice          whether calls may or must come.
    several         more than one may.
    dialect         how they are written.
    """

    template_tools: Sequence[Mapping[str, Any]] | None
    callable_tools: Sequence[Tool]
    choice: Choice
    several: bool
    dialect: Dialect
    reasoning_tag: str | None

    @property
    def has_form(self) -> bool:
        """Whether form_after() has any fields."""
        if self.choice == "auto" and self.dialect != "none":
            return not self.several or any(tool.strict for tool in self.callable_tools)
        return self.choice == "required"

    @property
    def form(self) -> dict[str, Any]:
        """form_after() a prompt that leaves the tag of thoughts closed."""
        return self.form_after("")

    def form_after(self, prompt_text: str) -> dict[str, Any]:
        """Fields of SamplingParams that guarantee what the tools promise; none if they promise nothing.

        They do where calls must come, where one at most may, and where a tool is strict: then every call has the name
        and the arguments of a tool.
        Raises InvalidRequestError: a schema can not be part of a form.
        """
        if not self.has_form:
            return {}
        must_call = self.choice == "required"
        schemas = [
            (tool.name, tool.checked_schema() if must_call or tool.strict else {"type": "object"})
            for tool in self.callable_tools
        ]
        return {
            "grammar": calls_form(
                schemas,
                self.dialect,
                must_call=must_call,
                several=self.several,
                reasoning_tag=self.reasoning_tag,
                inside=self._inside(prompt_text),
            )
        }

    def parser(self, prompt_text: str) -> AnswerParser:
        """For one continuation. prompt_text: the rendered prompt; its end says where the answer begins."""
        return AnswerParser(
            "none" if self.choice == "none" else self.dialect,
            names=[tool.name for tool in self.callable_tools],
            reasoning_tag=self.reasoning_tag,
            inside=self._inside(prompt_text),
        )

    def _inside(self, prompt_text: str) -> bool:
        return self.reasoning_tag is not None and prompt_text.rstrip().endswith(f"<{self.reasoning_tag}>")


def plan_answer(
    *,
    tools: object,
    tool_choice: object,
    parallel_tool_calls: bool | None,
    dialect: Dialect,
    reasoning_tag: str | None,
    flat: bool = False,
) -> AnswerPlan:
    """The plan of a request.

    tools, tool_choice  as OpenAI's chat requests have them; flat: as /v1/responses has them.
    dialect             of the model. Where it has none, calls come if they must, and are written as in "hermes".

    Raises InvalidRequestError that names the field.
    """
    found = read_tools(tools, flat=flat)
    choice, callable_tools = read_choice(tool_choice, found)
    return AnswerPlan(
        template_tools=[tool.definition for tool in found] if choice != "none" else None,
        callable_tools=callable_tools,
        choice=choice,
        several=parallel_tool_calls is not False,
        dialect="hermes" if dialect == "none" and choice == "required" else dialect,
        reasoning_tag=reasoning_tag,
    )
