"""What a run of the rig ends with when something is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Finding = Literal["race", "tokens", "logprobs", "books", "liveness", "error"]


@dataclass(frozen=True, slots=True)
class Violation:
    """What was broken, by which of the checks."""

    finding: Finding
    text: str

    @property
    def kind(self) -> str:
        """The finding, and the class of an error."""
        begins = self.text.split(":")[0]
        return f"{self.finding}: {begins}" if begins.endswith("Error") else self.finding

    def __str__(self) -> str:
        return f"{self.finding}: {self.text}"


class Broken(Exception):  # noqa: N818 - not an error of the program
    """Ends a run at its first violation."""

    def __init__(self, finding: Finding, text: str) -> None:
        super().__init__(f"{finding}: {text}")
        self.violation = Violation(finding, text)
