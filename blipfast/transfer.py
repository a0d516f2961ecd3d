"""Numbers that a GPU computes and the host reads, without stopping either."""

from __future__ import annotations

import torch
from torch import Tensor


class ToHost:
    """A tensor on its way to the host. `read` waits for it alone, not for what the device was given since."""

    def __init__(self, tensor: Tensor):
        self.copy, self.arrived = tensor, None
        if tensor.is_cuda:
            self.copy = tensor.to("cpu", non_blocking=True)  # pinned, so that the host goes on
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        """The tensor, on the host."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.copy
