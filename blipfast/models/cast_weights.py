"""Weights of linear layers in autocast's dtype, a module's all at once.

Autocast casts every weight and every bias by itself, and every gradient back: over a thousand launches in a
pre-training step, which cost the host more than the casts cost the GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from blipfast.ops.launch import autocast_dtype


@contextlib.contextmanager
def cast_weights(*modules: nn.Module) -> Iterator[None]:
    """Within, the fp32 linear layers of `modules` hold weights that were cast together; gradients reach their own.

    Does nothing outside autocast, under torch.compile, and where a layer's weight is not all here (ZeRO-3 brings it
    when the layer is called). A function that is recomputed in backward must enter this itself. Not for threads that
    share a model.
    """
    layers = [layer for module in modules for layer in module.modules() if type(layer) is nn.Linear]
    dtype = autocast_dtype(layers[0].weight) if layers and not torch.compiler.is_compiling() else None
    if dtype is None:
        yield
        return
    held = [
        (layer, name, weight)
        for layer in layers
        for name, weight in layer._parameters.items()
        if weight is not None and weight.dtype == torch.float32 and not hasattr(weight, "ds_id")
    ]
    try:
        # apart, because what a function gives out wants gradients if one of its inputs does
        for learned in (True, False):
            own = [one for one in held if one[2].requires_grad == learned]
            weights = [weight for _, _, weight in own]
            cast = _Cast.apply(dtype, *weights) if learned and weights else _copies(weights, dtype)
            for (layer, name, _), weight in zip(own, cast, strict=True):
                layer._parameters[name] = weight
        yield
    finally:
        for layer, name, weight in held:
            layer._parameters[name] = weight


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return _copies(weights, dtype)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        found = iter(_copies([x for x in gradients if x is not None], torch.float32))
        return None, *(None if x is None else next(found) for x in gradients)


def _copies(tensors, dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(x, dtype=dtype) for x in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)
