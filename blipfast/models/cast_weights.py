"""Weights of linear layers in autocast's dtype, a module's all at once.

Autocast casts every weight and every bias by itself, and every gradient back: over a thousand launches in a
pre-training step, which cost the host more than the casts cost the GPU.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from blipfast.ops.launch import autocast_dtype

from .packing import stacked

NAMES = ("weight", "bias")
Stacked = Callable[[Sequence[nn.Linear]], tuple[Tensor, Tensor]]  # as `packing.stacked`


@contextlib.contextmanager
def cast_weights(*modules: nn.Module, stacks: Sequence[Sequence[nn.Linear]] = ()) -> Iterator[Stacked]:
    """Within, the fp32 linear layers of `modules` hold weights that were cast together; gradients reach their own.

    stacks: layers that are used as one only; what this yields gives their weight and bias as `packing.stacked` does,
    but cast right into their places. Does nothing outside autocast, under torch.compile, and where a layer's weight is
    not all here (ZeRO-3 brings it when the layer is called). A function that is recomputed in backward must enter this
    itself. Not for threads that share a model.
    """
    as_one = [tuple(stack) for stack in stacks if _alike(stack)]
    used = set(itertools.chain(*as_one))
    linear = (layer for module in modules for layer in module.modules() if type(layer) is nn.Linear)
    alone = [(layer,) for layer in linear if layer not in used]
    groups = [(layers, name) for layers in [*alone, *as_one] for name in NAMES if _fits(layers[0], name)]
    dtype = autocast_dtype(groups[0][0][0].weight) if groups and not torch.compiler.is_compiling() else None
    if dtype is None:
        yield stacked
        return
    held = [(layers[0], name, getattr(layers[0], name)) for layers, name in groups if len(layers) == 1]
    cast: dict[tuple[nn.Linear, str], Tensor] = {}
    # apart, because what a function gives out wants gradients if one of its inputs does
    for learned in (True, False):
        own = [(layers, name) for layers, name in groups if getattr(layers[0], name).requires_grad == learned]
        weights = [getattr(layer, name) for layers, name in own for layer in layers]
        counts = [len(layers) for layers, _ in own]
        results = (
            _Cast.apply(dtype, counts, *weights) if learned and weights else _joined(weights, counts, dtype)
        )
        cast |= {(layers[0], name): result for (layers, name), result in zip(own, results, strict=True)}

    def given(stack: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
        return tuple(cast[stack[0], name] for name in NAMES) if tuple(stack) in as_one else stacked(stack)

    try:
        for layer, name, _ in held:
            layer._parameters[name] = cast[layer, name]
        yield given
    finally:
        for layer, name, weight in held:
            layer._parameters[name] = weight


def _fits(layer: nn.Linear, name: str) -> bool:
    weight = getattr(layer, name)
    return weight is not None and weight.dtype == torch.float32 and not hasattr(weight, "ds_id")


def _alike(stack: Sequence[nn.Linear]) -> bool:
    """Whether all of a stack's weights can be cast, and all or none of them learn."""
    every = [(layer, name) for layer in stack for name in NAMES]
    return all(_fits(*one) for one in every) and len({getattr(*one).requires_grad for one in every}) == 1


class _Cast(torch.autograd.Function):
    """Weights, of which the first counts[0] are stacked to the first result, and so on."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, counts: list[int], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.rows = [len(weight) for weight in weights]
        ctx.counts = counts
        return _joined(weights, counts, dtype)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        rows = iter(ctx.rows)
        parts: list[Tensor | None] = []
        for gradient, count in zip(gradients, ctx.counts, strict=True):
            sizes = list(itertools.islice(rows, count))
            parts += [None] * count if gradient is None else gradient.split(sizes)
        found = iter(_copies([x for x in parts if x is not None], torch.float32))
        return None, None, *(None if x is None else next(found) for x in parts)


def _joined(weights: Sequence[Tensor], counts: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Copies of weights, the first counts[0] of them stacked, and so on."""
    weights, results, places = list(weights), [], []
    start = 0
    for count in counts:
        rows = [len(weight) for weight in weights[start : start + count]]
        results.append(weights[start].new_empty((sum(rows), *weights[start].shape[1:]), dtype=dtype))
        places += results[-1].split(rows) if count > 1 else results[-1:]
        start += count
    if weights:
        torch._foreach_copy_(places, weights)
    return tuple(results)


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _joined(tensors, [1] * len(tensors), dtype)
