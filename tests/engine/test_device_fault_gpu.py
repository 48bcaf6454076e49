"""A fault inside a kernel: those who wait are told, the process can end, and it alone is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gapless.device import has_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")]

# In a process of its own, since the fault ends every later use of the GPU in the one that meets it.
SCRIPT = """
import sys
sys.path[:0] = sys.argv[2:]
import torch
from gapless.config import EngineConfig
from gapless.device import open_device
from gapless.engine.build import build_engine
from gapless.engine.core import EngineFailure
from gapless.errors import EngineDeadError
from gapless.params import SamplingParams
from gapless.sampling import make_sampler
from support.hash_model import HashModel

GPU = torch.device("cuda")

class FaultyModel(HashModel):
    left = 5

    def forward(self, tokens_T, kv, batch):
        self.left -= 1
        if self.left == 0:
            torch.zeros(1, device=GPU).index_select(0, tokens_T.long() + 10**6)
        return super().forward(tokens_T, kv, batch)

config = EngineConfig(
    lookahead=int(sys.argv[1]), max_rows=8, max_batch_tokens=64, num_blocks=200, graphs=False, device="cuda"
)
device = open_device("cuda")
model = FaultyModel(device=GPU)
model.left = 10**9  # not while memory is measured
engine = build_engine(model, config, device, make_sampler(GPU), torch.float32)
model.left = 5
params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
requests = [engine.admission.make_request([number], params) for number in range(4)]
engine.submit(requests)
ended = 0
while not isinstance(record := engine.next_output(), EngineFailure):
    ended += len(record.finished)
print("ended:", ended)
print("told:", " ".join(str(record.error).split()))
try:
    engine.submit(requests)
except EngineDeadError as error:
    print("refused:", " ".join(str(error).split()))
engine.close()
print("closed")
"""


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_a_fault_in_a_kernel_is_told_to_those_who_wait_and_the_process_ends(lookahead: int):
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", SCRIPT, str(lookahead), str(tests)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)  # or it hangs
    said = dict(line.split(":", 1) for line in ended.stdout.splitlines() if ":" in line)
    assert said.get("ended") == " 0", ended.stderr
    for each in ("told", "refused"):
        assert "device-side assert" in said[each]
        assert "start the process again" in said[each]
    # No word on the status: torch may abort when it frees pinned memory in a context that is broken.
    assert ended.stdout.endswith("closed\n")


def test_other_processes_can_use_the_gpu_afterwards():
    script = "import torch; assert torch.ones(3, device='cuda').sum().item() == 3"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
