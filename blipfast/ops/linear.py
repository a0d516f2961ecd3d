"""Linear layers without gradients: on a CPU by whichever library multiplies fastest.

torch gives fp32 products to MKL. On an Intel it needs up to twice oneDNN's time for few rows, as when decoding, once a
matrix outgrows the cache; on an AMD it makes do with AVX2, and needs twice to four times oneDNN's time for any. In bf16
torch asks oneDNN itself, which with AMX reads weights of few rows faster on the left, and without it slower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..processor import cpu_has, cpu_is_amd, products_win

# for how many rows each is faster, and for matrices of how many numbers; on a Xeon with AMX
ONEDNN_WINS, ONEDNN_SIZE = range(4, 129), 2**20  # fp32
LEFT_WINS = range(2, 97)  # bf16
# of so many rows oneDNN without AMX does 4 n + 1 and 4 n + 2, as a picture's 577 and 901, at two thirds of its speed
UNEVEN = range(513, 1024)

# what torch.compile calls for its linear layers; there is no public name for it
_onednn = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)


def linear(layer: nn.Module, x: Tensor, gelu: bool = False) -> Tensor:
    """layer(x), x [..., D] -> [..., F], and its GELU if asked for: the same to rounding.

    Layers that are not plain `nn.Linear` (int8), or have hooks, are called as they are.
    """
    if type(layer) is nn.Linear and not has_hooks(layer):  # ZeRO-3 brings the weight by a hook
        return product(x, layer.weight, layer.bias, gelu)
    y = layer(x)
    return F.gelu(y) if gelu else y


def is_plain(*layers: nn.Module) -> bool:
    """Whether weight and bias say all that these layers do: no int8, no LoRA, no hooks but ZeRO-3's, which brings the
    weight to whoever reads it, too."""
    return all(
        type(layer) is nn.Linear and (not has_hooks(layer) or hasattr(layer.weight, "ds_id"))
        for layer in layers
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x weight^T + bias, x [..., D], weight [F, D], and its GELU if asked for; with gradients as torch has it."""
    if x.device.type == "cpu" and not torch.is_grad_enabled() and _is_ours(x, weight):
        rows = x.shape[:-1].numel()
        if rows in UNEVEN and rows % 4 in (1, 2) and _by_onednn(x, rows, weight):
            even = F.pad(x.reshape(rows, -1), (0, 0, 0, -rows % 8))
            return product(even, weight, bias, gelu)[:rows].unflatten(0, x.shape[:-1])
        if x.dtype == torch.float32 and _by_onednn(x, rows, weight):
            kind, algorithm = ("gelu", "none") if gelu else ("none", "")
            return _onednn(x, weight, bias, kind, [], algorithm)
        few = rows in LEFT_WINS and bias is not None
        if x.dtype == torch.bfloat16 and few and cpu_has("amx_bf16"):
            y = torch.addmm(bias[:, None], weight, x.reshape(rows, -1).t()).t()  # (weight x^T)^T
            y = y.contiguous().unflatten(0, x.shape[:-1])  # SDPA is slow at queries that are not
            return F.gelu(y) if gelu else y
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def has_hooks(layer: nn.Module) -> bool:
    """Whether calling the layer does more than its `forward`."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return any(hooks)


def onednn_wins(rows: int, numbers: int) -> bool:
    """Whether oneDNN multiplies so many fp32 rows by a matrix of so many numbers faster than MKL."""
    return cpu_is_amd() or (rows in ONEDNN_WINS and numbers > ONEDNN_SIZE)


def _by_onednn(x: Tensor, rows: int, weight: Tensor) -> bool:
    """Whether oneDNN multiplies, without AMX: fp32 if it is the faster there, bf16 as torch has it."""
    if x.dtype == torch.float32:
        return _onednn is not None and onednn_wins(rows, weight.numel())
    return products_win(x.dtype)


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    """Neither of autocast nor of torch.compile, which choose themselves."""
    return (
        x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    )
