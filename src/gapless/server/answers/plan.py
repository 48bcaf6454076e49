"""What a request's tools and form ask of the answer: what the template is to show, what form it has, how it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gapless.errors import InvalidRequestError
from gapless.grammar.spec import GrammarSpec
from gapless.server.answers.forms import answer_form, calls_form
from gapless.server.answers.parser import CALL_TAG, AnswerParser, Dialect
from gapless.server.answers.tools import Choice, Tool, read_choice, read_tools


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """How one request's answers are made and read.

    template_tools  for the chat template; None: it is to show none.
    callable_tools  those that may be called.
    choice          whether calls may or must come.
    several         more than one may.
    dialect         how they are written.
    asked           the form that the request itself asks for, as fields of SamplingParams.
    composed        the same if thoughts may come before it or calls in its place; None: it is all of the answer's.
    """

    template_tools: Sequence[Mapping[str, Any]] | None
    callable_tools: Sequence[Tool]
    choice: Choice
    several: bool
    dialect: Dialect
    reasoning_tag: str | None
    asked: Mapping[str, Any]
    composed: GrammarSpec | None = None

    @property
    def has_form(self) -> bool:
        """Whether form_after() gives another form than the one that is asked for."""
        return self.composed is not None or self.calls_have_form

    @property
    def may_call(self) -> bool:
        """Whether the model may choose to call."""
        return self.choice == "auto" and self.dialect != "none"

    @property
    def calls_have_form(self) -> bool:
        """Whether the tools promise something."""
        if self.may_call:
            return not self.several or any(tool.strict for tool in self.callable_tools)
        return self.choice == "required"

    @property
    def form(self) -> dict[str, Any]:
        """form_after() a prompt that leaves the tag of thoughts closed."""
        return self.form_after("")

    def form_after(self, prompt_text: str) -> dict[str, Any]:
        """Fields of SamplingParams that guarantee what the tools and the form promise; none if they promise nothing.

        Tools do where calls must come, where one at most may, where a tool is strict, and beside a form: then every
        call has the name and the arguments of a tool.
        Raises InvalidRequestError: a schema can not be part of a form.
        """
        if not self.has_form:
            return {**self.asked}
        must_call = self.choice == "required"
        schemas = [
            (tool.name, tool.checked_schema() if must_call or tool.strict else {"type": "object"})
            for tool in self.callable_tools
        ]
        if self.composed is not None:
            return {
                "grammar": answer_form(
                    self.composed,
                    schemas if self.may_call else (),
                    self.dialect,
                    several=self.several,
                    reasoning_tag=self.reasoning_tag,
                    inside=self._inside(prompt_text),
                )
            }
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
            only_calls=self.choice == "required",
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
    asked: Mapping[str, Any] | None = None,
) -> AnswerPlan:
    """The plan of a request.

    tools, tool_choice  as OpenAI's chat requests have them; flat: as /v1/responses has them.
    dialect             of the model. Where it has none, calls come if they must, and are written as in "hermes".
    asked               the form of the answer: at most one field of those of SamplingParams.

    Raises InvalidRequestError that names the field.
    """
    found = read_tools(tools, flat=flat)
    choice, callable_tools = read_choice(tool_choice, found)
    plan = AnswerPlan(
        template_tools=[tool.definition for tool in found] if choice != "none" else None,
        callable_tools=callable_tools,
        choice=choice,
        several=parallel_tool_calls is not False,
        dialect="hermes" if dialect == "none" and choice == "required" else dialect,
        reasoning_tag=reasoning_tag,
        asked=asked or {},
    )
    return _with_form(plan) if asked else plan


def _with_form(plan: AnswerPlan) -> AnswerPlan:
    """With the form that is asked for put together with thoughts and calls, if these may come.

    A regex, choice or grammar that has their tags in it says itself where they stand: it is all of the answer's.
    Raises InvalidRequestError.
    """
    if plan.choice == "required":
        raise InvalidRequestError("response_format does not go together with a tool_choice that asks for calls")
    if not plan.may_call and plan.reasoning_tag is None:
        return plan
    spec = GrammarSpec.of(**plan.asked)
    if spec is None or spec.kind in ("json_schema", "json_object"):
        return replace(plan, composed=spec)
    tags = [] if plan.reasoning_tag is None else [f"</{plan.reasoning_tag}>"]
    if plan.may_call and plan.dialect == "hermes":
        tags.append(CALL_TAG)
    if any(tag in spec.text for tag in tags):
        if plan.calls_have_form:
            raise InvalidRequestError(f"{spec.kind}: with a tag in it, it does not go together with tools of a form")
        return plan
    if spec.kind == "grammar":
        way = f"write {' or '.join(tags)} into it, or " if tags else ""
        raise InvalidRequestError(
            "grammar: thoughts or calls may come as well, and a grammar has to say itself where they stand: "
            f"{way}give a regex, choice or json_schema"
        )
    return replace(plan, composed=spec)
