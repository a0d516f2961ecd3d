"""Attention of texts that are being written: the newest tokens look at a cache that they become part of."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .attention import HEAD_SIZES, attention
from .checks import check_dtype, check_same_device, check_same_dtype, check_shape
from .launch import input_precision, no_autocast, tuned
from .library import register

OP = "cached_attention"
MOST = 16  # new tokens of an image that the kernel takes

_INTERPRETED = {"BM": MOST, "BN": 16, "num_warps": 4, "num_stages": 1}
_table_says = backends.triton_serves(OP)


def _triton(qkv: Tensor) -> bool:
    return qkv.shape[1] <= MOST and qkv.shape[-1] in HEAD_SIZES and _table_says(qkv)


backends.register(OP, {"": (1, 3, 3, 12, 64)}, triton=_triton, torch=backends.always)


@torch.no_grad()
def cached_attention(qkv: Tensor, cache: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
    """Queries, keys and values [n, q, 3, H, d] of q new tokens of n texts -> [n, q, H, d].

    cache [n, S, 2, H, d]: keys and values; those of the new tokens go into their slots. slots [n, q] int64, different
    ones within a text, below S. mask [n, q, S'] bool, S' <= S: the slots that each token sees, one at least, of new
    tokens too. All of one dtype (fp32, fp16, bf16); scores are scaled by 1 / sqrt(d). Without gradients.
    Raises ValueError for wrong shapes, dtypes and devices. Served by: triton (CUDA, d 32, 64 or 128, q <= 16), torch.
    """
    check_shape(OP, "qkv", qkv, (None, None, 3, None, None))
    n, q, _, H, d = qkv.shape
    check_shape(OP, "cache", cache, (n, None, 2, H, d))
    check_shape(OP, "slots", slots, (n, q))
    check_shape(OP, "mask", mask, (n, q, None))
    if mask.shape[-1] > cache.shape[1]:
        raise ValueError(f"{OP}: mask speaks of {mask.shape[-1]} slots, cache has {cache.shape[1]}")
    check_dtype(OP, backends.FLOATS, qkv=qkv)
    check_dtype(OP, (torch.bool,), mask=mask)
    check_dtype(OP, (torch.int64,), slots=slots)
    check_same_dtype(OP, qkv=qkv, cache=cache)
    check_same_device(OP, qkv=qkv, cache=cache, slots=slots, mask=mask)
    if n and backends.choose(OP, qkv) == "triton":
        if q > MOST or d not in HEAD_SIZES:
            raise ValueError(
                f"{OP}: the kernel takes {MOST} new tokens and head sizes {HEAD_SIZES}, got {q} and {d}"
            )
        if cache.stride()[-2:] != (d, 1):
            raise ValueError(
                f"{OP}: in the kernel's cache heads lie one behind the other; got {cache.stride()}"
            )
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        return _op(qkv.contiguous(), cache, slots.contiguous(), mask, d**-0.5)
    rows = torch.arange(n, device=qkv.device)[:, None]
    cache[rows, slots] = qkv[:, :, 1:]
    key, value = cache[:, : mask.shape[-1]].permute(2, 0, 3, 1, 4)
    with no_autocast(qkv):
        return attention(qkv[:, :, 0].transpose(1, 2), key, value, mask[:, None]).transpose(1, 2)


def _kernel(qkv, cache, slots, mask, scale):
    from ..kernels.cached_attention import cached_attention

    config = tuned(OP, f"D={qkv.shape[-1]}", qkv, _INTERPRETED)
    return cached_attention(qkv, cache, slots, mask, scale, input_precision(), config)


def _fake(qkv, cache, slots, mask, scale):
    n, q, _, H, d = qkv.shape
    return qkv.new_empty(n, q, H, d)


_op = register(
    "cached_attention(Tensor qkv, Tensor(a!) cache, Tensor slots, Tensor mask, float scale) -> Tensor",
    _kernel,
    _fake,
)
