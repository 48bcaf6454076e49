"""Log probabilities as a caller gets them: each where it belongs, once, in order, and right."""

from __future__ import annotations

from collections.abc import Sequence

from gapless.outcome import LogprobLines, PromptLogprobs
from support.sim.findings import Broken
from support.sim.oracle import fault_of_line, weights_at
from support.sim.owners import Owners


class Lines:
    """Reads those of all requests of a run.

    scored                 tokens of each prompt whose log probabilities are there, but the first, which has none
    of_tokens, of_prompts  lines that were read
    """

    def __init__(self, owners: Owners) -> None:
        self.scored: dict[int, int] = {}
        self.of_tokens = self.of_prompts = 0
        self._owners = owners

    def read(self, request_id: int, before: Sequence[int], token: int, lines: LogprobLines | None, index: int) -> None:
        """Of one token, after those before it, which comes after the log probabilities of all of the prompt."""
        move = self._owners.moves[request_id]
        if move.params.prompt_logprobs is not None and self.scored.get(request_id, 0) < len(move.prompt) - 1:
            raise Broken("logprobs", f"request {request_id} has a token before all of its prompt")
        if lines is not None:
            key = weights_at(move.weights, len(before))
            self._check_line(request_id, (*move.prompt, *before), key, token, lines, index, of_prompt=False)
            self.of_tokens += move.params.logprobs is not None
        elif move.params.logprobs is not None:
            raise Broken("logprobs", f"request {request_id} got token {token} without any")

    def read_prompt(self, piece: PromptLogprobs) -> None:
        """Every token of a prompt once, in order."""
        request_id = piece.request_id
        move, scored = self._owners.moves[request_id], self.scored.get(request_id, 0)
        if piece.begin != scored + 1:
            raise Broken("logprobs", f"request {request_id} got those of token {piece.begin} after token {scored}")
        for index in range(piece.lines.ranks_L.size):
            at = piece.begin + index
            key = weights_at(self._owners.prompt_weights[request_id], at - 1)
            self._check_line(request_id, move.prompt[:at], key, move.prompt[at], piece.lines, index, of_prompt=True)
        self.scored[request_id] = scored + piece.lines.ranks_L.size
        self.of_prompts += piece.lines.ranks_L.size

    def _check_line(
        self,
        request_id: int,
        prefix: Sequence[int],
        key: int,
        token: int,
        lines: LogprobLines,
        index: int,
        *,
        of_prompt: bool,
    ) -> None:
        params = self._owners.moves[request_id].params
        wanted = params.prompt_logprobs if of_prompt else params.logprobs
        ids, logprobs = lines.ids_LK[index].tolist(), lines.logprobs_LK[index].tolist()
        if wrong := fault_of_line(ids, logprobs, int(lines.ranks_L[index]), prefix, key, token, wanted):
            raise Broken("logprobs", f"request {request_id}, at {len(prefix)}: {wrong}")
