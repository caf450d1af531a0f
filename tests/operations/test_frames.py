"""How many of Python's frames lie between a block and Triton, with launches stubbed in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST = 5

STUBBED = """
import json, sys, triton
# Before the kernels are imported: a CPU then takes the way that a GPU takes, up to the launch.
triton.knobs.runtime.interpret = True
import torch
from triton.runtime.interpreter import InterpretedFunction


from dit_fast.model.dit import DiT

found = {}

def launched(kernel):
    def run(**arguments):
        names, frame = [], sys._getframe(1)
        # To the module that calls an operation, or `normed`, which does so for blocks and final layers.
        while True:
            code = frame.f_code
            of_the_model = "/dit_fast/" in code.co_filename and "/kernels/" not in code.co_filename
            if of_the_model and code.co_name not in ("norm_modulate", "normed"):
                break
            names.append(code.co_name)
            frame = frame.f_back
        found[kernel.fn.__name__] = max(found.get(kernel.fn.__name__, []), names, key=len)
    return run

InterpretedFunction.__getitem__ = lambda self, grid: launched(self)
model = DiT(input_size=4, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=3,
            kernels="triton", attention="triton", mlp_epilogue="separate", qk_norm=True)
args = torch.randn(2, 4, 4, 4), torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
for gradients in (False, True):
    with torch.set_grad_enabled(gradients):
        model(*args)
print(json.dumps(found))
"""


def test_few_frames_between_a_block_and_a_launch() -> None:
    """Forward, with and without gradients; PyTorch's own frames count as well."""
    result = subprocess.run([sys.executable, "-c", STUBBED], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    frames = json.loads(result.stdout.splitlines()[-1])
    assert frames.keys() >= {"_adaln_fwd_kernel", "_gated_residual_adaln_fwd_kernel", "_gelu_fwd_kernel"}
    deep = {kernel: names for kernel, names in frames.items() if len(names) > MOST}
    assert not deep
