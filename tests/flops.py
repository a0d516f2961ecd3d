"""Floating-point operations of a function, counted while it runs; a multiplication and an addition are two."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blipfast.ops import linear


def flop(run: Callable[[], object]) -> int:
    # SDPA as products, which are counted; its own kernel on a CPU is not, nor is oneDNN's linear layer
    known = {} if linear._onednn is None else {linear._onednn: _of_linear}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=known) as counter:
        run()
    return counter.get_total_flops()


def _of_linear(x: list[int], weight: list[int], *_, out_shape=None, **__) -> int:
    return 2 * prod(x) * weight[0]
