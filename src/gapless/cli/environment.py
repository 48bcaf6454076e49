"""GAPLESS_<OPTION>: variables that no option reads are errors, as unknown options are."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gapless.errors import ConfigError

PREFIX = "GAPLESS_"
OTHERS = ("GAPLESS_CACHE", "GAPLESS_DEBUG")  # variables that stand for no option
# What Kubernetes puts into every container beside a service whose name begins with "gapless".
_LINK = re.compile(
    r"\w+_(SERVICE_(HOST|PORT(_\w+)?)=|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=|PORT=(tcp|udp|sctp)://)"
)


def check_environment(program: Any, environment: Mapping[str, str]) -> None:
    """Whether each variable with our prefix is one that a command of the program reads. Raises ConfigError."""
    known = {*OTHERS, *_variables(program)}
    for name, value in sorted(environment.items()):
        if name.startswith(PREFIX) and name not in known and not _LINK.match(f"{name}={value}"):
            raise ConfigError(f"the environment has {name}, which no option reads{_hint(name, known)}")


def _variables(command: Any) -> Iterator[str]:
    for option in command.params:
        if isinstance(option.envvar, str):
            yield option.envvar
    for each in getattr(command, "commands", {}).values():
        yield from _variables(each)


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.removeprefix(PREFIX), [each.removeprefix(PREFIX) for each in known], n=1)
    return f"; did you mean {PREFIX}{close[0]}?" if close else ""
