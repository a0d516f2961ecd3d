"""Attention: dense for pictures, packed for texts of different lengths, shared for texts that read the same image.

    softmax(scale Q K^T) V, probabilities dropped out

Heads are of any size; kernels serve 32, 64 and 128. On a GPU "triton" serves half precision by itself where its table
says it wins, and "sdpa" the rest; "flash_attn" and "xformers" serve when asked for (`backends.use`). What these two do
not have, masks and `first`, goes to "sdpa".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from . import attention_torch as by
from .attention_layout import Layout
from .checks import (
    check_dtype,
    check_probability,
    check_same_device,
    check_same_dtype,
    check_same_shape,
    check_shape,
)
from .launch import autocast_dtype, input_precision, no_autocast, tuned
from .library import register
from .seeds import draw_seed

__all__ = ["Layout", "apart", "attention", "attention_qkv", "attention_varlen"]

OP = "attention"
HEAD_SIZES = (32, 64, 128)  # that the kernels have
FEW = 20  # queries a segment, up to which tiles of few rows serve: a text over itself, beams over an image
_INTERPRETED = {"BM": 16, "BN": 32, "num_warps": 4, "num_stages": 1}  # small, and both kinds of key tile
_PYTORCH = {"torch": by.usual, "sdpa": by.sdpa}
_DENSE = {"flash_attn": by.flash_attn_dense, "xformers": by.xformers_dense}
_PACKED = {"flash_attn": by.flash_attn_packed, "xformers": by.xformers_packed}

_wins = {
    (d, kind): backends.triton_serves(OP, backends.HALVES, f"forward D={d} {kind}")
    for d in HEAD_SIZES
    for kind in ("dense", "shared", "few")
}


def _triton(q: Tensor) -> bool:
    """q is packed, [T, H, d], or dense, [B, N, H, d]. Few dense queries were measured in decoding, not in training."""
    kind = "shared" if q.ndim == 3 else "dense" if q.shape[1] > FEW else "few"
    if kind == "few" and torch.is_grad_enabled() and q.requires_grad:
        return False
    return (q.shape[-1], kind) in _wins and _wins[q.shape[-1], kind](q)


def _only_if_asked(q: Tensor) -> bool:
    return False


backends.register(
    OP,
    {"of pictures": (1, 197, 12, 64), "of texts": (14, 12, 64), "in decoding": (1, 3, 12, 64)},
    triton=_triton,
    sdpa=lambda q: q.is_cuda,
    torch=backends.always,
    flash_attn=_only_if_asked,
    xformers=_only_if_asked,
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Dense attention: query [B, H, N, d], key and value [B, H, S, d] -> [B, H, N, d].

    Any strides. fp32, fp16 or bf16, all the same; inside autocast they are cast to its dtype. mask: bool (True: attend)
    or additive, broadcastable to [B, H, N, S]; PyTorch serves it. dropout: probability, 0 in evaluation. scale:
    1 / sqrt(d) unless given. causal: the last query sees the last key. Differentiable once.
    Raises ValueError for wrong shapes, dtypes, devices, scales and probabilities.
    Served by: triton (CUDA, half precision, d 32, 64 or 128, no mask), sdpa, torch; flash_attn, xformers if asked for.
    """
    query, key, value = _cast(query, key, value)
    check_shape(OP, "query", query, (None, None, None, None))
    B, H, N, d = query.shape
    check_shape(OP, "key", key, (B, H, None, d))
    scale = _check(query, key, value, dropout, scale)
    if causal and N > key.shape[2]:
        raise ValueError(f"{OP}: causal needs at least as many keys as queries, got {key.shape[2]} and {N}")
    if mask is not None:
        _check_mask(mask, query, (B, H, N, key.shape[2]))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    name = backends.choose(OP, q)
    if name not in _PYTORCH and mask is not None:
        name = "sdpa"
    if name == "triton":
        settings = (draw_seed(q) if dropout else None, scale, dropout, causal, -1)
        out = _Attention.apply(None, None, None, *settings, *_laid_out((q, k, v)))
    elif name in _DENSE:
        out = _DENSE[name](q, k, v, causal, dropout, scale)
    else:
        with no_autocast(q):
            out = by.dense(_PYTORCH[name], q, k, v, mask, causal, dropout, scale)
    return out.transpose(1, 2)


def attention_qkv(qkv: Tensor, dropout: float = 0.0, scale: float | None = None) -> Tensor:
    """Dense self-attention of queries, keys and values out of one projection: [B, N, 3, H, d] -> [B, N, H, d].

    As `attention` of `qkv.unbind(2)`, but the kernel writes the gradient as one tensor, so nothing is stacked.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{OP}: qkv must be [B, N, 3, H, d], got {list(qkv.shape)}")
    (qkv,) = _cast(qkv)
    q, k, v = qkv.unbind(2)
    if backends.choose(OP, q) != "triton":
        out = attention(*(x.transpose(1, 2) for x in (q, k, v)), dropout=dropout, scale=scale)
        return out.transpose(1, 2)
    scale = _check(q, k, v, dropout, scale)
    settings = (draw_seed(q) if dropout else None, scale, dropout, False, -1)
    return _Attention.apply(None, None, None, *settings, *_laid_out((qkv,)))


def apart(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, of which the last two or all may come as one tensor: (q, k, v), (q, kv) or (qkv,).

    In one tensor they lie side by side, [..., 2 or 3, H, d], as one projection makes them; their gradient then is one
    tensor, too. Raises ValueError for other shapes.
    """
    if len(parts) == 3:
        return tuple(parts)
    *alone, joined = parts
    if len(alone) > 1 or joined.ndim < 4 or joined.shape[-3] != 3 - len(alone):
        shapes = [list(x.shape) for x in parts]
        raise ValueError(
            f"{OP}: takes q, k, v, or q and kv [..., 2, H, d], or qkv [..., 3, H, d]; got {shapes}"
        )
    return *alone, *joined.unbind(-3)


def attention_varlen(
    parts: Sequence[Tensor],
    layout: Layout,
    *,
    causal: bool = False,
    first: int | None = None,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attention of packed texts, queries [T, H, d] -> [T, H, d], to the keys that `layout` says each text reads.

    parts: queries, keys and values, see `apart`. Keys and values: packed [S, H, d] (the texts themselves; other texts),
    or dense [M, N, H, d] (images). Keys that many texts read are never copied; their gradients are summed over the
    texts, by the kernel in a fixed order.
    causal: a text's query i sees its keys up to `first` + i; None: so that its last query sees its last key. A query
    that sees no key gets 0. key_mask: bool [M, N], which dense keys count, at least one of each image; PyTorch
    serves it. Otherwise as `attention`.
    Served by: triton (CUDA, half precision, d 32, 64 or 128), sdpa, torch; flash_attn, xformers if asked for.
    """
    parts = _cast(*parts)
    query, key, value = apart(parts)
    scale = _check(query, key, value, dropout, scale)
    _check_layout(query, key, layout, causal, first, key_mask)
    name = backends.choose(OP, query)
    if name not in _PYTORCH and (key_mask is not None or (name in _PACKED and first is not None)):
        name = "sdpa"
    if name == "triton":
        k_offsets = layout.key_offsets if key.ndim == 3 else None
        places = (layout.query_offsets, k_offsets, layout.rows)
        start = -1 if first is None else first
        settings = (draw_seed(query) if dropout else None, scale, dropout, causal, start)
        return _Attention.apply(*places, *settings, *_laid_out(parts))
    if name in _PACKED:
        return _PACKED[name](query, key, value, layout, causal, dropout, scale)
    with no_autocast(query):
        return by.packed(_PYTORCH[name], query, key, value, layout, key_mask, causal, first, dropout, scale)


def _cast(*tensors: Tensor) -> list[Tensor]:
    """As autocast casts them, if they are floats at all."""
    check_dtype(OP, backends.FLOATS, **dict(zip(("query", "key", "value"), tensors)))
    dtype = autocast_dtype(tensors[0])
    return [x if dtype is None else x.to(dtype) for x in tensors]


def _check(query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float | None) -> float:
    """The scale."""
    check_same_shape(OP, key=key, value=value)
    check_same_dtype(OP, query=query, key=key, value=value)
    check_same_device(OP, query=query, key=key, value=value)
    check_probability(OP, "dropout", dropout)
    if not query.ndim or not query.shape[-1]:
        raise ValueError(f"{OP}: heads must have at least one number, got query {list(query.shape)}")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"{OP}: scale must be positive, got {scale}")
    return scale


def _check_mask(mask: Tensor, query: Tensor, scores: tuple[int, ...]) -> None:
    check_same_device(OP, query=query, mask=mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"{OP}: mask must be bool (True: attend) or additive floats, got {mask.dtype}; use mask.bool()"
        )
    missing = len(scores) - mask.ndim
    if missing < 0 or any(size not in (1, all_of) for size, all_of in zip(mask.shape, scores[missing:])):
        raise ValueError(f"{OP}: mask must be broadcastable to {list(scores)}, got {list(mask.shape)}")


def _check_layout(query, key, layout, causal, first, key_mask) -> None:
    heads = list(query.shape[1:])
    if query.ndim != 3 or query.shape[0] != layout.T:
        raise ValueError(
            f"{OP}: query must be [{layout.T}, H, d], as its layout says, got {list(query.shape)}"
        )
    images = key.ndim == 4
    N = key.shape[1] if images else None
    dense_fits = len(key) == layout.M and (layout.keys_each == N or not layout.M)
    fits = dense_fits if images else len(key) == layout.S
    if key.ndim not in (3, 4) or not fits or list(key.shape[-2:]) != heads:
        raise ValueError(
            f"{OP}: key must be [{layout.S}, {heads[0]}, {heads[1]}] or, if all keys are equally many, "
            f"[{layout.M}, N, {heads[0]}, {heads[1]}], as its layout says; got {list(key.shape)}"
        )
    if query.device.type != layout.device.type:
        raise ValueError(
            f"{OP}: query is on {query.device}, its layout on {layout.device}; make it for that device"
        )
    if causal and layout.grouped:
        raise ValueError(f"{OP}: causal needs each text to have its own keys; leave the layout's index out")
    if first is not None and (not causal or first < 0):
        raise ValueError(f"{OP}: first is the place of a causal text's first query, 0 or more, got {first}")
    if key_mask is not None and (
        not images or key_mask.shape != key.shape[:2] or key_mask.dtype != torch.bool
    ):
        raise ValueError(
            f"{OP}: key_mask must be bool [M, N] of dense keys, got {key_mask.dtype} {list(key_mask.shape)}"
        )


def _check_head_size(q: Tensor) -> None:
    if q.shape[-1] not in HEAD_SIZES:
        raise ValueError(
            f"{OP}: the kernels have head sizes {HEAD_SIZES}, got {q.shape[-1]}; use backend 'torch'"
        )


def _laid_out(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """As the kernels take them: rows of heads contiguous, keys and values with the same strides."""
    _check_head_size(parts[0])
    parts = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in parts)
    if len(parts) == 3 and parts[1].stride() != parts[2].stride():
        parts = (parts[0], *(x.contiguous() for x in parts[1:]))
    return parts


class _Attention(torch.autograd.Function):
    """parts: q [B, N, H, d] or [T, H, d], k and v; or some of them in one tensor."""

    @staticmethod
    def forward(ctx, q_offsets, k_offsets, rows, seed, scale, dropout, causal, first, *parts):
        settings = (scale, dropout, causal, first)
        o, lse = _forward(parts, q_offsets, k_offsets, rows, seed, *settings)
        ctx.save_for_backward(o, lse, q_offsets, k_offsets, rows, seed, *parts)
        ctx.settings = settings
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        o, lse, q_offsets, k_offsets, rows, seed, *parts = ctx.saved_tensors
        grads = _backward(parts, do, o, lse, q_offsets, k_offsets, rows, seed, *ctx.settings)
        return *(None,) * 8, *grads


def _tiles(kernel: str, q: Tensor, segments, dropout: float):
    """The tuned tiles for this kind of work, by the mean rows and keys of a segment."""
    count = max(segments.count, 1)
    if q.dtype == torch.float32:
        kind = "fp32"
    elif segments.queries > FEW * count:
        kind = "shared dropout" if dropout else "dense" if q.ndim == 4 else "shared"
    else:  # a text over itself; a text, or beams, over an image that hardly anybody else reads
        kind = "text" if segments.keys <= 48 * count else "few"
    return tuned(OP, f"{kernel} D={segments.D} {kind}", q, _INTERPRETED)


def _forward_kernel(parts, q_offsets, k_offsets, rows, seed, scale, dropout, causal, first):
    from ..kernels import attention as kernel

    q, k, v = apart(parts)
    segments = kernel.Segments(q, k, q_offsets, k_offsets, rows)
    tiles = _tiles("forward", q, segments, dropout)
    return kernel.attention(q, k, v, segments, seed, scale, dropout, causal, first, input_precision(), tiles)


def _forward_fake(parts, q_offsets, k_offsets, rows, seed, scale, dropout, causal, first):
    q = apart(parts)[0]
    return q.new_empty(q.shape), q.new_empty((q.shape[-2], q.shape[:-2].numel()), dtype=torch.float32)


def _backward_kernel(parts, do, o, lse, q_offsets, k_offsets, rows, seed, scale, dropout, causal, first):
    from ..kernels import attention as kernel
    from ..kernels import attention_bwd

    grads = _backward_fake(parts)
    q, k, v = apart(parts)
    segments = kernel.Segments(q, k, q_offsets, k_offsets, rows)
    tiles = [_tiles(name, q, segments, dropout) for name in ("dq", "dkv")]
    settings = (scale, dropout, causal, first, input_precision())
    attention_bwd.attention_backward(
        do.contiguous(), q, k, v, o, lse, *apart(grads), segments, seed, *settings, *tiles
    )
    return grads


def _backward_fake(parts, *rest):
    return [x.new_empty(x.shape) for x in parts]


_places = "Tensor? q_offsets, Tensor? k_offsets, Tensor? rows, Tensor? seed, "
_settings = "float scale, float dropout, bool causal, int first"
_forward = register(
    f"attention_forward(Tensor[] parts, {_places}{_settings}) -> (Tensor, Tensor)",
    _forward_kernel,
    _forward_fake,
)
_backward = register(
    f"attention_backward(Tensor[] parts, Tensor do, Tensor o, Tensor lse, {_places}{_settings}) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
)
