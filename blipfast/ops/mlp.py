"""The feed-forward of a transformer block: linear, GELU, linear."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from .checks import check_dtype, check_rows, check_same_device, check_same_dtype, check_shape
from .gelu_gradient import gelu_gradient
from .launch import autocast_dtype, input_precision, no_autocast, tuned
from .library import register
from .linear import product


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """gelu(x weight1^T + bias1) weight2^T + bias2, with the exact (erf) GELU.

    x [..., D], weight1 [F, D], bias1 [F], weight2 [D', F], bias2 [D'] -> [..., D']; one dtype (fp32, fp16, bf16), or
    whatever under autocast, which then sets it. Sums are fp32; the hidden state is rounded to the dtype before GELU
    and after. Differentiable once in all arguments. For backward x and the [..., F] state before GELU are kept, and
    not the one after it.
    Raises ValueError for other shapes, several dtypes or devices. Served by: triton (CUDA), torch.
    """
    tensors = {"x": x, "weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    check_rows("mlp", "x", x)
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

    backend = backends.choose("mlp", x) if x.numel() else "torch"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight1, bias1, weight2, bias2)):
        rows = x.reshape(-1, x.shape[-1])
        gradient = backends.choose("gelu_gradient", rows)
        y = _Mlp.apply(rows.contiguous(), weight1, bias1, weight2, bias2, backend, gradient)
        return y.view(*x.shape[:-1], len(weight2))
    if backend == "torch":
        return product(product(x, weight1, bias1, gelu=True), weight2, bias2)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    a, _ = _linear_gelu(rows, weight1.contiguous(), bias1.contiguous(), False)
    return F.linear(a, weight2, bias2).view(*x.shape[:-1], len(weight2))


class _Mlp(torch.autograd.Function):
    """Backward has x and the hidden state before GELU; the state after it is made again.

    fused: "triton" if GELU is in the kernels of the products, else "torch". gradient: who serves GELU's backward then.
    """

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, fused, gradient):
        if fused == "triton":
            a, h = _linear_gelu(x, weight1.contiguous(), bias1.contiguous(), True)
        else:
            h = F.linear(x, weight1, bias1)
            a = F.gelu(h)
        ctx.save_for_backward(x, weight1, weight2, h)
        ctx.served = fused, gradient
        return F.linear(a, weight2, bias2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight1, weight2, h = ctx.saved_tensors
        fused, gradient = ctx.served
        dy, needs = dy.contiguous(), ctx.needs_input_grad
        with no_autocast(dy):  # which whoever calls backward may have on
            if fused == "triton":
                dh, a, db1 = _linear_dgelu(dy, weight2.contiguous(), h)
            else:
                dh, a, db1 = gelu_gradient(dy @ weight2, h, gradient)
            return (
                dh @ weight1 if needs[0] else None,
                dh.T @ x if needs[1] else None,
                db1.to(dy.dtype) if needs[2] else None,
                dy.T @ a if needs[3] else None,
                dy.sum(0) if needs[4] else None,
                None,
                None,
            )


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
