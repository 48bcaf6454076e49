"""How many tokens a step may have: what was configured, and less after a step has run out of memory."""

from __future__ import annotations

FIRST_PATIENCE = 16


class TokenBudget:
    """Halves when a step runs out of memory; doubles back after `patience` good steps.

    The patience doubles with every failure, so that sooner or later the longest recompute fits between two of them.
    Once all tokens are allowed again it falls back in the same way.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tokens = limit
        self.patience = FIRST_PATIENCE
        self._good_steps = 0

    def step_failed(self, tokens: int) -> None:
        """A step of this many tokens has run out of memory."""
        self.tokens = max(1, tokens // 2)
        self.patience *= 2
        self._good_steps = 0

    def step_succeeded(self) -> None:
        """A step has run to its end."""
        if self.patience == FIRST_PATIENCE:
            return  # none has failed of late: the tokens are at their limit
        self._good_steps += 1
        if self._good_steps < self.patience:
            return
        self._good_steps = 0
        if self.tokens < self.limit:
            self.tokens = min(2 * self.tokens, self.limit)
        else:
            self.patience //= 2
