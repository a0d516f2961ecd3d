"""Registers kernel wrappers as PyTorch operators `torch.ops.blipfast.*`.

Compiled graphs then hold a kernel as one node, with `fake` saying what comes out. Cheaper per call than
`torch.library.custom_op`; outputs must not alias inputs. Autograd belongs to the operation's file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import Library

_library = Library("blipfast", "FRAGMENT")  # what it defines lives as long as it does


def register(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Define `blipfast::<schema>` for CUDA and (interpreted) CPU tensors; returns the operator to call.

    schema: as in "twice(Tensor x, float scale) -> Tensor". fake: same arguments, returns empty tensors of the exact
    shapes, strides and dtypes.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, on_its_gpu(implementation), "CUDA")
    _library.impl(name, implementation, "CPU")
    torch.library.register_fake(f"blipfast::{name}", fake, lib=_library)
    return getattr(torch.ops.blipfast, name).default


def on_its_gpu(launch: Callable) -> Callable:
    """Triton launches on the current GPU; this makes it the one that the first argument is on, a tensor or several."""

    @functools.wraps(launch)
    def launcher(first: Tensor | list[Tensor], *rest, **more):
        device = (first if isinstance(first, Tensor) else first[0]).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launch(first, *rest, **more)
        with torch.cuda.device(device):
            return launch(first, *rest, **more)

    return launcher
