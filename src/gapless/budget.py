"""How many tokens a step may have: what was configured, and less while steps run out of memory."""

from __future__ import annotations

FIRST_PATIENCE = 16
ONE_TOKEN_TRIES = 3


class TokenBudget:
    """Spares the first failure in a calm time, halves with every further one, doubles back after `patience` good steps.

    A failure means that somebody else has taken the memory for a moment, or that steps are too large for what is left.
    The first one is taken for the former: everything is recomputed in steps of the same size. The budget itself is
    halved and not the size of the failed step: that a step of two tokens failed says nothing against larger ones.

    patience    good steps until the tokens double, and, once all are allowed again, until it halves itself. Every run
                of failures doubles it. At FIRST_PATIENCE, or the steps that `longest` tokens take at the limit if
                they are more, the time is calm.
    exhausted   steps of a single token have failed ONE_TOKEN_TRIES times without `patience` good steps in a row
                between: no budget helps.

    After a failure all sequences are recomputed, the oldest first and with the whole budget, so it gets its next token
    within as many good steps as its tokens take. If it never got one, no run of good steps would be that long: the
    patience would not halve again (that takes as many at the limit), so it would double until the budget does not
    grow any more either; the budget would fall to one token, and its failures end the engine. Hence the oldest gets on
    or everybody is told; nothing is recomputed for ever.
    """

    def __init__(self, limit: int, longest: int = 0) -> None:
        self.limit = limit
        self.tokens = limit
        self._calm = max(FIRST_PATIENCE, -(-longest // limit))
        self.patience = self._calm
        self._failing = False
        self._good_steps = 0
        self._failed_singles = 0

    @property
    def exhausted(self) -> bool:
        return self._failed_singles >= ONE_TOKEN_TRIES

    @property
    def last_try(self) -> bool:
        """Whether one more failure of a step of a single token makes it exhausted."""
        return self._failed_singles == ONE_TOKEN_TRIES - 1

    def step_failed(self, tokens: int) -> None:
        """A step of this many tokens has run out of memory."""
        if self.patience > self._calm:
            self.tokens = max(1, self.tokens // 2)
        if not self._failing:
            self.patience *= 2
        self._failing = True
        self._good_steps = 0
        self._failed_singles += tokens == 1

    def step_succeeded(self) -> None:
        """A step has run to its end."""
        if self.patience == self._calm:
            return
        self._failing = False
        self._good_steps += 1
        if self._good_steps < self.patience:
            return
        self._good_steps = self._failed_singles = 0
        if self.tokens < self.limit:
            self.tokens = min(2 * self.tokens, self.limit)
        else:
            self.patience //= 2
