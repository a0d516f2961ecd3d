"""A launch of ours gives a compiled kernel what a launch of Triton's gives it, addresses in the place of tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A driver without a GPU and a compiler that compiles nothing: what is "run" is written down.
FAKE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 7)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

class Kernel:
    function, packed_metadata = "function", "metadata"
    def launch_metadata(self, *args): return None
    def run(self, *args): ran.append(args)

def compile(self, key, *args, **kwargs):
    compiled.append(key)
    return self.device_caches[0][0].setdefault(key, Kernel())

ran, compiled = [], []
driver.set_active(Driver())
jit.JITFunction._do_compile = compile
torch.cuda.current_device = lambda: 0
torch._C._cuda_getCurrentRawStream = lambda device: 7
from blipfast.kernels import attention, layer_norm, launcher

def plain(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x
"""

SAME = """
def both(run):
    run()  # compiled, and launched by Triton
    ran.clear()
    run()
    (ours,) = ran
    launch, launcher.launch = launcher.launch, None
    for module in (attention, layer_norm):
        module.launch = lambda fn, grid, *args, **options: fn[grid](*args, **options)
    run()
    for module in (attention, layer_norm):
        module.launch = launch
    launcher.launch = launch
    theirs = ran[1]
    assert ours[:6] == theirs[:6] and len(ours) == len(theirs), (ours, theirs)
    assert list(ours[9:]) == [plain(x) for x in theirs[9:]], (ours, theirs)

q, k = torch.randn(100, 12, 64).half(), torch.randn(4, 577, 12, 64).half()
segments = attention.Segments(q, k, torch.tensor([0, 20, 50, 80, 100], dtype=torch.int32), None, None)
config = {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3}
out = torch.empty(0)
q.new_empty = lambda *shape, **more: out  # the same addresses every time
both(lambda: attention.attention(q, k, k, segments, None, 0.125, 0.0, True, 2, "ieee", config))
print("same")
"""

KINDS = """
x, y = torch.randn(33, 48), torch.empty(33, 48)
weight, mean = torch.randn(48), torch.empty(33)

def run(x=x, D=48, T=33, rows=2, seed=None):
    before = len(compiled), len(ran)
    launcher.launch(
        layer_norm._forward, (5,), x, x, weight, weight, y, y, mean, mean, seed, T, D, 1e-6, 0, 1.0,
        STORE_Z=True, ROWS=rows, BLOCK_D=64, num_warps=4,
    )
    assert len(ran) == before[1] + 1
    return len(compiled) - before[0]

assert run() == 1 and run() == 0
assert run(T=32) == 0, "not specialised"
assert run(D=47) == 1 and run(D=45) == 0 and run(D=1) == 1, "a multiple of 16, or one"
assert run(x=x.half()) == 1 and run(x=x.flatten()[1:]) == 1, "dtype and alignment"
assert run(rows=4) == 1 and run(seed=torch.tensor([1])) == 1
assert run() == 0
triton.knobs.runtime.launch_enter_hook = lambda metadata: None
run()
assert ran[-1][7] is not None, "Triton's own launch calls the hooks"
print("same")
"""


@pytest.mark.parametrize("code", [SAME, KINDS], ids=["arguments", "kinds"])
def test_without_a_gpu(code):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", FAKE + code]
    run = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)
    assert run.stdout == "same\n", run.stderr
