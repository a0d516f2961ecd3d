"""Weights of linear layers in autocast's dtype, a module's all at once.

Autocast casts every weight and every bias by itself, and every gradient back: over a thousand launches in a
pre-training step, which cost the host more than the casts cost the GPU.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from blipfast.ops.launch import autocast_dtype

from .packing import stacked

NAMES = ("weight", "bias")
Stacked = Callable[[Sequence[nn.Linear]], tuple[Tensor, Tensor]]  # as `packing.stacked`


@contextlib.contextmanager
def cast_weights(*modules: nn.Module, stacks: Iterable[Sequence[nn.Linear]] = ()) -> Iterator[Stacked]:
    """Within, the fp32 linear layers of `modules` hold weights that were cast together; gradients reach their own.

    stacks: layers that are used as one only; what this yields gives their weight and bias as `packing.stacked` does,
    but cast right into their places. Does nothing outside autocast, under torch.compile, and where a layer's weight is
    not all here (ZeRO-3 brings it when the layer is called). A function that is recomputed in backward must enter this
    itself. Threads that share a model may meet each other's cast weights, which are the same.
    """
    as_one = [tuple(stack) for stack in stacks if _alike(stack)]
    used = set(itertools.chain(*as_one))
    layers = [*((layer,) for layer in _linear(modules) if layer not in used), *as_one]
    groups = [(each, name) for each in layers for name in NAMES]
    # each is read once: another thread may put its own in its place, and that must not be put back as the weight
    weights = [[layer._parameters.get(name) for layer in each] for each, name in groups]
    fitting = [i for i, own in enumerate(weights) if all(map(_fits, own))]
    groups, weights = ([some[i] for i in fitting] for some in (groups, weights))
    dtype = None
    if groups and not torch.compiler.is_compiling():
        dtype = autocast_dtype(weights[0][0])
    if dtype is None:
        yield stacked
        return
    cast: list[Tensor | None] = [None] * len(groups)
    # apart, because what a function gives out wants gradients if one of its inputs does
    for learned in {own[0].requires_grad for own in weights}:
        places = [i for i, own in enumerate(weights) if own[0].requires_grad == learned]
        counts = [len(weights[i]) for i in places]
        every = [weight for i in places for weight in weights[i]]
        results = _Cast.apply(dtype, counts, *every) if learned else _joined(every, counts, dtype)
        for i, result in zip(places, results):
            cast[i] = result
    of_stack = {(each, name): result for (each, name), result in zip(groups, cast) if len(each) > 1}

    def given(stack: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
        found = tuple(of_stack.get((tuple(stack), name)) for name in NAMES)
        return stacked(stack) if any(weight is None for weight in found) else found

    alone = [(each[0]._parameters, name) for each, name in groups if len(each) == 1]
    try:
        for (parameters, name), weight in zip(alone, cast):
            parameters[name] = weight
        yield given
    finally:
        for (parameters, name), (weight, *_) in zip(alone, weights):
            parameters[name] = weight


def _linear(modules: Iterable[nn.Module]) -> Iterator[nn.Linear]:
    """The plain linear layers in modules; `Module.modules` takes five times as long."""
    for module in modules:
        if type(module) is nn.Linear:
            yield module
        elif module is not None and module._modules:
            yield from _linear(module._modules.values())


def _fits(weight: Tensor | None) -> bool:
    """No parameter where a layer has none of its own: no bias, a replica, a pruned layer; another thread's cast one."""
    own = isinstance(weight, nn.Parameter)
    return own and weight.dtype == torch.float32 and not hasattr(weight, "ds_id")


def _alike(stack: Sequence[nn.Linear]) -> bool:
    """Whether all of a stack's weights can be cast, and all or none of them learn."""
    every = [layer._parameters.get(name) for layer in stack for name in NAMES]
    return all(map(_fits, every)) and len({weight.requires_grad for weight in every}) == 1


class _Cast(torch.autograd.Function):
    """Weights, of which the first counts[0] are stacked to the first result, and so on."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, counts: list[int], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.rows, ctx.counts = [weight.shape[0] for weight in weights], counts
        return _joined(weights, counts, dtype)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        parts: list[Tensor | None] = []
        for gradient, count in zip(gradients, ctx.counts, strict=True):
            if count == 1 or gradient is None:
                parts += [gradient] * count
            else:
                parts += gradient.split_with_sizes(ctx.rows[len(parts) : len(parts) + count])
        given = [x for x in parts if x is not None]
        found = iter(_joined(given, [1] * len(given), torch.float32))
        return None, None, *(None if x is None else next(found) for x in parts)


def _joined(weights: Sequence[Tensor], counts: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Copies of weights, the first counts[0] of them stacked, and so on."""
    results, places = [], []
    for count in counts:
        first = weights[len(places)]
        if count == 1:
            results.append(torch.empty_like(first, dtype=dtype))
            places.append(results[-1])
        else:
            rows = [weight.shape[0] for weight in weights[len(places) : len(places) + count]]
            results.append(first.new_empty((sum(rows), *first.shape[1:]), dtype=dtype))
            places += results[-1].split_with_sizes(rows)
    if places:
        torch._foreach_copy_(places, list(weights))
    return tuple(results)
