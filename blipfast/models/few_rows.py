"""Linear layers of few rows on a CPU, as when decoding: a step reads every weight for a row a beam.

torch gives fp32 products to MKL, which needs up to twice oneDNN's time for them once a matrix outgrows the cache. In
bf16 torch asks oneDNN itself, which reads weights faster on the left.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# for how many rows each is faster, and for matrices of how many numbers; on a Xeon with AMX
ONEDNN_WINS, ONEDNN_SIZE = range(4, 129), 2**20  # fp32
LEFT_WINS = range(2, 97)  # bf16

# what torch.compile calls for its linear layers; there is no public name for it
_onednn = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)


def linear(layer: nn.Module, x: Tensor, gelu: bool = False) -> Tensor:
    """layer(x), x [..., D] -> [..., F], and its GELU if asked for: the same to rounding, without gradients.

    Layers that are not plain `nn.Linear` (int8) are called as they are.
    """
    rows = x.shape[:-1].numel()
    if type(layer) is nn.Linear and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        large = layer.weight.numel() > ONEDNN_SIZE
        if x.dtype == torch.float32 and rows in ONEDNN_WINS and large and _onednn is not None:
            kind, algorithm = ("gelu", "none") if gelu else ("none", "")
            return _onednn(x, layer.weight, layer.bias, kind, [], algorithm)
        if x.dtype == torch.bfloat16 and rows in LEFT_WINS:  # (weight x^T)^T instead of x weight^T
            y = torch.addmm(layer.bias[:, None], layer.weight, x.reshape(rows, -1).t()).t()
            y = y.contiguous().unflatten(0, x.shape[:-1])  # SDPA is slow at queries that are not
            return F.gelu(y) if gelu else y
    y = layer(x)
    return F.gelu(y) if gelu else y
