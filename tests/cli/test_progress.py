"""The bar of `gapless generate --input` counts what is written, not what is computed."""

from pathlib import Path

from gapless import LLM, SamplingParams
from gapless.progress import Progress


class Counts(Progress):
    """Keeps how many requests were counted, and at the same time taken."""

    def __init__(self) -> None:
        super().__init__(None, False)
        self.taken = 0
        self.counted = [(0, 0)]

    def advance(self, *, tokens: int, running: int, finished: int) -> None:
        self.counted.append((self.counted[-1][0] + finished, self.taken))


def test_a_request_counts_once_its_output_was_taken(model: Path):
    progress = Counts()
    with LLM(str(model), load="random", device="cpu", num_blocks=64) as llm:
        params = [SamplingParams(max_tokens=1 + place % 3, ignore_eos=True) for place in range(9)]
        for _ in llm.run([llm.prepare("abc", each) for each in params], progress=progress):
            progress.taken += 1
    assert progress.counted[-1] == (9, 9)
    assert all(counted <= taken for counted, taken in progress.counted)
