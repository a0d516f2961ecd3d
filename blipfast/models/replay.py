"""A function of tensors that stay where they are, as a CUDA graph: one launch instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch


def replays(device: torch.device) -> bool:
    """Whether to record functions here: on GPUs, but not under autocast, whose copies of weights do not stay."""
    return device.type == "cuda" and not torch.is_autocast_enabled("cuda")


class Replay:
    """Calls `function`, which changes tensors in place and reads nothing on the host.

    The first call runs it, which compiles kernels; the second records it; all later ones replay the record.
    """

    def __init__(self, function: Callable[[], None]):
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None
        self.compiled = False

    def __call__(self) -> None:
        if not self.compiled:
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):  # as recording does: libraries set themselves up for each stream
                self.function()
            here.wait_stream(aside)
            self.compiled = True
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, capture_error_mode="thread_local"
            ):  # a loader's threads may pin memory
                self.function()
            self.graph = graph
        self.graph.replay()
