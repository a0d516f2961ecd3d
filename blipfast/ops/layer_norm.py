"""LayerNorm of a residual sum, with dropout: post-norm as in MED, and pre-norm as in ViT, which keeps the sum.

    z = dropout(x) + residual        y = LayerNorm(z)

Fused, the sum is written once and never read again before backward, and backward needs no dropout mask in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .checks import (
    check_dtype,
    check_probability,
    check_rows,
    check_same_device,
    check_same_shape,
    check_shape,
)
from .launch import autocast_dtype, multiprocessors, tuned
from .library import register
from .seeds import draw_seed

OP = "layer_norm"
KERNEL_WIDTH = 4096  # the widest row that a kernel takes

_INTERPRETED = {"elements": 256, "num_warps": 4, "per_processor": 2}

_table_says = backends.triton_serves(OP, bucket="forward")
backends.register(OP, triton=lambda x: x.shape[-1] <= KERNEL_WIDTH and _table_says(x), torch=backends.always)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, dropout: float = 0.0, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Pre-norm: `(LayerNorm(z), z)` with z = dropout(x) + residual, the input of a branch and the new residual.

    x, residual [..., D]; weight, bias [D]; fp32, fp16 or bf16, each its own. z has the dtype that x + residual has; y
    has it too, or autocast's inside autocast, because the linear layer that follows would cast it so. Statistics are
    fp32. dropout: probability, 0 in evaluation; its mask comes from the device's random generator. Differentiable once
    in all four tensors; weight gradients are summed in fp32 in a fixed order.
    Raises ValueError for wrong shapes, dtypes, devices or probabilities. Served by: triton (D <= 4096), torch.
    """
    y_dtype = autocast_dtype(x) or torch.promote_types(x.dtype, residual.dtype)
    return _run(x, residual, weight, bias, dropout, eps, y_dtype, keep_sum=True)


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, dropout: float = 0.0, eps: float = 1e-12
) -> Tensor:
    """Post-norm: LayerNorm(dropout(x) + residual), in the dtype of x + residual, also under autocast.

    So the residual's dtype decides whether the stream of hidden states is fp32 (as in official BLIP under autocast) or
    half precision. Otherwise as `add_layer_norm`.
    """
    return _run(x, residual, weight, bias, dropout, eps, torch.promote_types(x.dtype, residual.dtype))[0]


def _run(x, residual, weight, bias, dropout, eps, y_dtype, keep_sum=False) -> tuple[Tensor, Tensor]:
    check_rows(OP, "x", x)
    check_same_shape(OP, x=x, residual=residual)
    check_shape(OP, "weight", weight, x.shape[-1:])
    check_shape(OP, "bias", bias, x.shape[-1:])
    check_dtype(OP, backends.FLOATS, x=x, residual=residual, weight=weight, bias=bias)
    check_same_device(OP, x=x, residual=residual, weight=weight, bias=bias)
    check_probability(OP, "dropout", dropout)
    if backends.choose(OP, x) == "torch":
        return _torch(x, residual, weight, bias, dropout, eps, y_dtype)
    rows = [tensor.reshape(-1, x.shape[-1]).contiguous() for tensor in (x, residual)]
    weight, bias = weight.contiguous(), bias.contiguous()
    seed = draw_seed(x) if dropout > 0 else None
    wants_gradient = any(tensor.requires_grad for tensor in (x, residual, weight, bias))
    if torch.is_grad_enabled() and wants_gradient:
        y, z = _AddLayerNorm.apply(*rows, weight, bias, seed, dropout, eps, y_dtype)
    else:
        y, z, _, _ = _forward(*rows, weight, bias, seed, dropout, eps, y_dtype, keep_sum)
    return y.view(x.shape), z.view(x.shape) if keep_sum else z


def _torch(x, residual, weight, bias, dropout, eps, y_dtype) -> tuple[Tensor, Tensor]:
    z = (F.dropout(x, dropout) if dropout else x) + residual
    same = z.dtype == weight.dtype == bias.dtype
    rows, weight, bias = (z, weight, bias) if same else (z.float(), weight.float(), bias.float())
    return F.layer_norm(rows, x.shape[-1:], weight, bias, eps).to(y_dtype), z


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, seed, dropout, eps, y_dtype):
        y, z, mean, rstd = _forward(x, residual, weight, bias, seed, dropout, eps, y_dtype, True)
        ctx.save_for_backward(z, mean, rstd, weight, seed)
        ctx.settings = dropout, x.dtype, residual.dtype
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dz):
        z, mean, rstd, weight, seed = ctx.saved_tensors
        dropout, x_dtype, residual_dtype = ctx.settings
        if dy is None:
            dy = torch.zeros_like(z)
        dx, dr, dw, db = _backward(dy, dz, z, mean, rstd, weight, seed, dropout, x_dtype, residual_dtype)
        return dx if len(dx) == len(dr) else dr, dr, dw, db, None, None, None, None


def _forward_kernel(x, residual, weight, bias, seed, dropout, eps, y_dtype, store_z):
    from ..kernels import layer_norm as kernel

    z_dtype = torch.promote_types(x.dtype, residual.dtype)
    config = tuned(OP, "forward", x, _INTERPRETED)
    return kernel.forward(x, residual, weight, bias, seed, dropout, eps, y_dtype, z_dtype, store_z, config)


def _forward_fake(x, residual, weight, bias, seed, dropout, eps, y_dtype, store_z):
    T = x.shape[0] if store_z else 0
    z = x.new_empty((T, x.shape[1]), dtype=torch.promote_types(x.dtype, residual.dtype))
    statistic = x.new_empty(T, dtype=torch.float32)
    return torch.empty_like(x, dtype=y_dtype), z, statistic, torch.empty_like(statistic)


def _backward_kernel(dy, dz, z, mean, rstd, weight, seed, dropout, x_dtype, residual_dtype):
    from ..kernels import layer_norm as kernel

    dy, dz = dy.contiguous(), None if dz is None else dz.contiguous()  # sums give expanded gradients
    config = tuned(OP, "backward", z, _INTERPRETED)
    programs = multiprocessors(z.device) * config["per_processor"]
    return kernel.backward(
        dy, dz, z, mean, rstd, weight, seed, dropout, x_dtype, residual_dtype, config, programs
    )


def _backward_fake(dy, dz, z, mean, rstd, weight, seed, dropout, x_dtype, residual_dtype):
    own_dx = dropout > 0 or x_dtype != residual_dtype
    dx = z.new_empty((z.shape[0] if own_dx else 0, z.shape[1]), dtype=x_dtype)
    dr = torch.empty_like(z, dtype=residual_dtype)
    return dx, dr, torch.empty_like(weight), torch.empty_like(weight)


_forward = register(
    "add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? seed, float dropout, "
    "float eps, ScalarType y_dtype, bool store_z) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_kernel,
    _forward_fake,
)
_backward = register(
    "add_layer_norm_backward(Tensor dy, Tensor? dz, Tensor z, Tensor mean, Tensor rstd, Tensor weight, Tensor? seed, "
    "float dropout, ScalarType x_dtype, ScalarType residual_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
)
