"""The feed-forward of a transformer block: linear, GELU, linear."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from .checks import check_dtype, check_same_device, check_same_dtype, check_shape
from .launch import autocast_dtype, input_precision, tuned
from .library import register


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """gelu(x weight1^T + bias1) weight2^T + bias2, with the exact (erf) GELU.

    x [..., D], weight1 [F, D], bias1 [F], weight2 [D', F], bias2 [D'] -> [..., D']; one dtype (fp32, fp16, bf16), or
    whatever under autocast, which then sets it. Sums are fp32; the hidden state is rounded to the dtype before GELU
    and after. Differentiable once in all arguments. For backward x and the [..., F] state before GELU are kept, and
    not the one after it.
    Raises ValueError for other shapes, several dtypes or devices. Served by: triton (CUDA), torch.
    """
    tensors = {"x": x, "weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    if x.ndim == 0:
        raise ValueError("mlp: x must have shape [..., D], got a scalar")
    check_shape("mlp", "weight1", weight1, (None, x.shape[-1]))
    check_shape("mlp", "bias1", bias1, weight1.shape[:1])
    check_shape("mlp", "weight2", weight2, (None, weight1.shape[0]))
    check_shape("mlp", "bias2", bias2, weight2.shape[:1])
    check_dtype("mlp", backends.FLOATS, **tensors)
    check_same_device("mlp", **tensors)
    if dtype := autocast_dtype(x):
        x, weight1, bias1, weight2, bias2 = (t.to(dtype) for t in tensors.values())
    else:
        check_same_dtype("mlp", **tensors)

    if backends.choose("mlp", x) == "torch" or not x.numel():
        return gelu_linear(F.linear(x, weight1, bias1), weight2, bias2)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    weights = (weight1.contiguous(), bias1.contiguous(), weight2.contiguous(), bias2)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (rows, *weights)):
        y = _Mlp.apply(rows, *weights)
    else:
        y = F.linear(_linear_gelu(rows, *weights[:2], False)[0], *weights[2:])
    return y.view(*x.shape[:-1], -1)


def gelu_linear(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(h) weight^T + bias, with the exact (erf) GELU, of which backward keeps h alone.

    h [..., F], weight [D, F], bias [D] -> [..., D]; one dtype, or under autocast its own, to which the weights are
    cast. GELU is computed again in backward: a pass over h, for a quarter of what a feed-forward would keep. Served by
    torch.
    """
    if not torch.is_grad_enabled():
        return F.linear(F.gelu(h), weight, bias)
    if dtype := autocast_dtype(h):
        h, weight, bias = (t.to(dtype) for t in (h, weight, bias))
    return _GeluLinear.apply(h, weight, bias)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias):
        ctx.save_for_backward(h, weight)
        return F.linear(F.gelu(h), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        h, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dh = torch.ops.aten.gelu_backward(dy @ weight, h) if needs[0] else None
        rows = dy.reshape(-1, dy.shape[-1])
        dweight = rows.t() @ F.gelu(h).reshape(-1, h.shape[-1]) if needs[1] else None
        return dh, dweight, rows.sum(0) if needs[2] else None


# --------------------------------------------------------------------------------------------------------- triton

backends.register(
    "mlp", triton=backends.triton_serves("mlp", backends.HALVES, "forward"), torch=backends.always
)

# Interpreted on a CPU, tiles are small so that small inputs have several of them.
INTERPRETED = {"BM": 16, "BN": 32, "BK": 16, "GROUP": 2, "num_warps": 4, "num_stages": 1}


def _forward(x, weight, bias, keep):
    from ..kernels.mlp import linear_gelu

    config = tuned("mlp", "forward", x, INTERPRETED)
    return linear_gelu(x, weight, bias, keep, input_precision(), config)


def _forward_fake(x, weight, bias, keep):
    rows = x.shape[0]
    return x.new_empty(rows, weight.shape[0]), x.new_empty(rows if keep else 0, weight.shape[0])


_linear_gelu = register(
    "linear_gelu(Tensor x, Tensor weight, Tensor bias, bool keep) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def _backward(dy, weight, h):
    from ..kernels.mlp import linear_dgelu

    return linear_dgelu(dy, weight, h, input_precision(), tuned("mlp", "backward", h, INTERPRETED))


def _backward_fake(dy, weight, h):
    return torch.empty_like(h), torch.empty_like(h), h.new_empty(h.shape[1], dtype=torch.float32)


_linear_dgelu = register(
    "linear_dgelu(Tensor dy, Tensor weight, Tensor h) -> (Tensor, Tensor, Tensor)", _backward, _backward_fake
)


class _Mlp(torch.autograd.Function):
    """Two products in each pass are ours, with GELU in them; the others are the BLAS library's."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2):
        a, h = _linear_gelu(x, weight1, bias1, True)
        ctx.save_for_backward(x, weight1, weight2, h)
        return F.linear(a, weight2, bias2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight1, weight2, h = ctx.saved_tensors
        dy = dy.contiguous()
        dh, a, db1 = _linear_dgelu(dy, weight2, h)
        needs = ctx.needs_input_grad
        return (
            dh @ weight1 if needs[0] else None,
            dh.T @ x if needs[1] else None,
            db1.to(dy.dtype) if needs[2] else None,
            dy.T @ a if needs[3] else None,
            dy.sum(0) if needs[4] else None,
        )
