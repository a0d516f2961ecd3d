"""A linear layer of many rows, whose bias's gradient PyTorch would take as long for as for a matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from .column_sum import OP, column_sum
from .launch import autocast_dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x, weight, bias); differentiable once in all three where `column_sum` serves its rows, else as often as
    one likes. x [..., D], weight [F, D], bias [F] -> [..., F]; under autocast in its dtype."""
    if bias is None or not x.numel() or not (torch.is_grad_enabled() and bias.requires_grad):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    backend = backends.choose(OP, rows)
    if backend == "torch":
        return F.linear(x, weight, bias)
    if dtype := autocast_dtype(x):
        rows, weight, bias = (t.to(dtype) for t in (rows, weight, bias))
    return _Linear.apply(rows, weight, bias, backend).view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, bias, backend):
        ctx.save_for_backward(rows, weight)
        ctx.backend = backend
        return F.linear(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx = dy @ weight if needs[0] else None
        dweight = dy.t() @ rows if needs[1] else None
        return dx, dweight, column_sum(dy, ctx.backend) if needs[2] else None, None
