"""Linear layers of few rows on a CPU, as when decoding: a step reads every weight for a row a beam."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# with the weight on the left MKL and oneDNN read it up to twice as fast; fp32: below, MKL has kernels of its own
LEFT_WINS = {torch.float32: range(6, 65), torch.bfloat16: range(2, 97)}


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), x [..., D] -> [..., F]; of few rows (weight x^T)^T instead of x weight^T, the same to rounding.

    Layers that are not plain `nn.Linear` (int8) are called as they are.
    """
    rows = x.shape[:-1].numel()
    if type(layer) is not nn.Linear or x.device.type != "cpu" or rows not in LEFT_WINS.get(x.dtype, ()):
        return layer(x)
    y = torch.addmm(layer.bias[:, None], layer.weight, x.reshape(rows, -1).t()).t()
    return y.contiguous().unflatten(0, x.shape[:-1])  # SDPA is slow at queries that are not
