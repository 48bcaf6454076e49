"""A lookahead for a while, such as for a comparison: who asked for it may be gone before it sets the old one again, and
while it measures nobody else's measurement may change it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from gapless.errors import GaplessError

if TYPE_CHECKING:
    from gapless.server.context import EngineSource


class LeasedError(GaplessError):
    """Somebody else has set the lookahead for a while, which is not over."""


class LookaheadLease:
    """Of one engine's source. All of it belongs to the event loop's thread."""

    def __init__(self, engines: EngineSource) -> None:
        self._engines = engines
        self._lock = asyncio.Lock()
        self._usual = 0
        self._owner: str | None = None
        self._return: asyncio.Task[None] | None = None

    async def set(self, lookahead: int, seconds: float | None = None, owner: str | None = None) -> None:
        """Go on with so many steps in flight: for good, whatever was before, or for so many seconds, and then with as
        many as before.

        owner  who asks for a while. Its later calls take the place of its earlier ones; another's are refused.

        Raises LeasedError, ConfigError, UnavailableError.
        """
        async with self._lock:
            over = self._return is None or self._return.done()
            if not over and seconds is not None and owner != self._owner:
                raise LeasedError("the lookahead is set for a while by somebody else, such as a comparison: try later")
            if over and seconds is not None:
                self._usual = (await self._engines.stats()).lookahead
            await self._engines.set_lookahead(lookahead)
            self._owner = owner
            if self._return is not None:
                self._return.cancel()
            self._return = None if seconds is None else asyncio.create_task(self._give_back(seconds))

    async def _give_back(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        async with self._lock:  # whoever sets another one just now cancels this
            with suppress(GaplessError):  # another engine begins with the usual one
                await self._engines.set_lookahead(self._usual)
