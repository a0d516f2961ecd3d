"""Linear layers of few rows on a CPU, as when decoding: a step reads every weight for a row a beam.

torch gives fp32 products to MKL, which on an Intel needs up to twice oneDNN's time for them once a matrix outgrows the
cache, and on an AMD, where it makes do with AVX2, twice to four times for all of them. In bf16 torch asks oneDNN
itself, which with AMX reads weights faster on the left, and without it slower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.precision import cpu_has, cpu_is_amd

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
    if type(layer) is nn.Linear and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        rows = x.shape[:-1].numel()
        if x.dtype == torch.float32 and _onednn is not None and onednn_wins(rows, layer.weight.numel()):
            kind, algorithm = ("gelu", "none") if gelu else ("none", "")
            return _onednn(x, layer.weight, layer.bias, kind, [], algorithm)
        if x.dtype == torch.bfloat16 and rows in LEFT_WINS and cpu_has("amx_bf16"):
            y = torch.addmm(layer.bias[:, None], layer.weight, x.reshape(rows, -1).t()).t()  # (weight x^T)^T
            y = y.contiguous().unflatten(0, x.shape[:-1])  # SDPA is slow at queries that are not
            return F.gelu(y) if gelu else y
    y = layer(x)
    return F.gelu(y) if gelu else y


def onednn_wins(rows: int, numbers: int) -> bool:
    """Whether oneDNN multiplies so many fp32 rows by a matrix of so many numbers faster than MKL."""
    return cpu_is_amd() or (rows in ONEDNN_WINS and numbers > ONEDNN_SIZE)
