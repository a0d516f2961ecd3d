"""What the backward pass of a feed-forward makes of its hidden state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .checks import check_dtype, check_same_device, check_same_dtype, check_same_shape, check_shape
from .launch import multiprocessors, tuned
from .library import register

OP = "gelu_gradient"

_INTERPRETED = {"ROWS": 4, "COLUMNS": 32, "num_warps": 4, "per_processor": 1}
backends.register(OP, triton=backends.triton_serves(OP), torch=backends.always)


def gelu_gradient(da: Tensor, h: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """For a = gelu(h), exact (erf), and its gradient da: (dh, a, dh summed over rows).

    da, h [T, F] -> [T, F], [T, F], [F]; one dtype (fp32, fp16, bf16). Not differentiable: for backward passes.
    backend: whoever was chosen in the forward pass; None: chosen now. Raises ValueError for other shapes and where
    dtypes or devices differ. Served by: triton (CUDA), torch.
    """
    check_shape(OP, "h", h, (None, None))
    check_same_shape(OP, h=h, da=da)
    check_dtype(OP, backends.FLOATS, h=h)
    check_same_dtype(OP, h=h, da=da)
    check_same_device(OP, h=h, da=da)
    backend = backend or backends.choose(OP, h)
    if backend == "torch" or not h.numel():
        dh = torch.ops.aten.gelu_backward(da, h)
        return dh, F.gelu(h), dh.sum(0)
    return _op(da.contiguous(), h.contiguous())


def _kernel(da, h):
    from ..kernels.gelu_gradient import gelu_gradient

    config = tuned(OP, "default", h, _INTERPRETED)
    return gelu_gradient(da, h, multiprocessors(h.device) * config["per_processor"], config)


def _fake(da, h):
    return torch.empty_like(h), torch.empty_like(h), h.new_empty(h.shape[1])


_op = register("gelu_gradient(Tensor da, Tensor h) -> (Tensor, Tensor, Tensor)", _kernel, _fake)
