"""A function of tensors that stay where they are, as a CUDA graph: one launch instead of hundreds."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def replays(device: torch.device) -> bool:
    """Whether to record functions here: on GPUs, but not under autocast, whose copies of weights do not stay."""
    return device.type == "cuda" and not torch.is_autocast_enabled("cuda")


class Replay:
    """Calls `function`, which changes tensors of one GPU in place and reads nothing on the host.

    The first call runs it, which compiles kernels; the second records it; all later ones replay the record.
    """

    def __init__(self, function: Callable[[], None], device: torch.device):
        self.function, self.device = function, device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.compiled = False

    def __call__(self) -> None:
        with torch.cuda.device(self.device):
            if self.graph is None:
                here, aside = torch.cuda.current_stream(), stream_aside(self.device)
                aside.wait_stream(here)
                with torch.cuda.stream(aside):
                    self.record() if self.compiled else self.function()
                here.wait_stream(aside)
                if not self.compiled:
                    self.compiled = True
                    return
            self.graph.replay()

    def record(self) -> None:
        """Not by torch.cuda.graph: it waits for the GPU and gives all cached memory back each time."""
        graph = torch.cuda.CUDAGraph()
        # or the generator's state would be for inference alone; and a loader's thread may pin memory meanwhile
        with torch.inference_mode(False):
            graph.capture_begin(capture_error_mode="thread_local")
        try:
            self.function()
        finally:
            graph.capture_end()
        self.graph = graph


@functools.cache
def stream_aside(device: torch.device) -> torch.cuda.Stream:
    """One stream a GPU to run on before recording and to record on: libraries keep memory for each stream they see."""
    return torch.cuda.Stream(device)
