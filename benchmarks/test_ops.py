"""Every operation's cases: on a CPU the PyTorch paths beside eager, on a GPU our kernels and their peers.

`make bench-gpu` measures a GPU far more thoroughly; this is what runs anywhere.
"""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import ops
from benchmarks.cases import Case
from benchmarks.measure import close, tensors
from benchmarks.worker import collect

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES, FAILED = collect(DEVICE, [ops])

pytestmark = pytest.mark.usefixtures("one_thread")


def title(case: Case) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", f"{case.op} {case.shape} {case.mode}")


def test_every_operation_gives_cases():
    assert not FAILED


def check_equal(contenders) -> None:
    """Everybody computes what "eager", or else our PyTorch path, does; unless that draws random numbers for dropout."""
    base = "eager" if "eager" in contenders else "ours torch"

    def results(label):
        torch.manual_seed(0)  # the gradients that are sent back are drawn in the first call
        return tensors(contenders[label]())

    wanted = results(base)
    if all(map(torch.equal, tensors(contenders[base]()), wanted)):
        for label in contenders:
            found = results(label)
            assert len(found) == len(wanted) and all(map(close, found, wanted)), label


@pytest.mark.parametrize("case", [case for case in CASES if case.rank == 0], ids=title)
def test_operation(contest, case):
    def finished(function):
        def run():
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        return run

    torch._dynamo.reset()
    contenders = case.setup()
    check_equal(contenders)
    contest(title(case), {label: finished(f) for label, f in contenders.items()}, per=1)
