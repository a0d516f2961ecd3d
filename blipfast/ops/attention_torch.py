"""Attention by PyTorch and by other libraries; `blipfast.ops.attention` has checked the arguments.

Dense functions take q [B, N, H, d] and k, v [B, N', H, d]; packed ones take q [T, H, d], k and v packed or dense, and a
Layout. Both give q's shape. causal: the last query of a row of the batch sees its last key.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..processor import products_win
from .attention_layout import Layout

SHORT = 256  # keys up to which, in bf16 on a CPU, the formula is faster than SDPA in fp32
MANY = 32  # queries and keys from which products are faster than SDPA where `products_win`
SCORES = 2_000_000  # at a time: more outgrow the cache, and memory that the system has just given takes twice as long
WASTE = 2.5  # cells of a table a row, above which, on a CPU, one product an image is faster than one over the table


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float) -> Tensor:
    """The formula itself. mask: bool (True: sees) or additive, broadcastable to [B, H, N, N']."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = F.dropout(_probabilities(q, k, mask, scale).to(v.dtype), dropout)
    return (weights @ v).transpose(1, 2)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale Q K^T) in fp32 of q [B, H, N, d] and k [B, H, N', d]."""
    scores = (q * scale) @ k.transpose(-2, -1)
    if mask is not None and mask.dtype == torch.bool:  # finite: a query that sees nothing has gradients, of 0
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32)


def in_parts(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The formula without mask, dropout and gradients, for so many images and heads at a time as `SCORES` allows."""
    B, N, H, _ = q.shape
    scores = N * k.shape[1]
    images, heads = (max(1, SCORES // each) for each in (H * scores, scores))
    out = q.new_empty(q.shape)
    for b in range(0, B, images):
        for h in range(0, H, heads):
            part = slice(b, b + images), slice(None), slice(h, h + heads)
            query, key, value = (x[part].transpose(1, 2) for x in (q, k, v))
            weights = ((query * scale) @ key.transpose(-2, -1)).softmax(-1)
            out[part] = (weights @ value).transpose(1, 2)
    return out


class Dropped(torch.autograd.Function):
    """`plain` in fp32 with dropout, of which backward keeps one [B, H, N, N']: probabilities, negative where dropped.

    Autograd would keep them before dropout and after it, and the mask; SDPA, scaled copies of keys besides.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, dropout, scale):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        p = _probabilities(q, k, mask, scale)
        kept = torch.empty_like(p).bernoulli_(1 - dropout)
        ctx.save_for_backward(q, k, v, torch.addcmul(p.neg(), p, kept, value=2))
        ctx.settings = dropout, scale
        return (p.mul_(kept) @ v).div_(1 - dropout).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, signed = ctx.saved_tensors
        dropout, scale = ctx.settings
        do = do.transpose(1, 2) / (1 - dropout)
        kept = signed.clamp(min=0)
        dv = kept.transpose(-2, -1) @ do
        ds = (do @ v.transpose(-2, -1)).mul_(kept)  # dP P; softmax subtracts its sum, spread by P
        ds.addcmul_(signed.abs(), ds.sum(-1, keepdim=True), value=-1).mul_(scale)
        dq, dk = ds @ k, ds.transpose(-2, -1) @ q
        return *(x.transpose(1, 2) for x in (dq, dk, dv)), None, None, None


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float) -> Tensor:
    """`scaled_dot_product_attention`, by whichever of its backends PyTorch prefers."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # it takes no other dtype; and fp32's least number must not become -inf
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        mask = mask.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2)


def usual(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float) -> Tensor:
    """The formula; on a CPU SDPA, which is as fast for texts, faster for pictures, and does not keep the scores.

    But SDPA's half-precision backward takes ten times as long there as its fp32 one, and with dropout it keeps them.
    """
    if q.device.type != "cpu":
        return plain(q, k, v, mask, dropout, scale)
    if not torch.is_grad_enabled():
        many = min(q.shape[1], k.shape[1]) >= MANY
        if many and mask is None and not dropout and products_win(q.dtype):
            return in_parts(q, k, v, scale)
        return sdpa(q, k, v, mask, dropout, scale)
    if q.dtype == torch.bfloat16 and k.shape[1] <= SHORT:
        return plain(q, k, v, mask, dropout, scale)
    learned = mask is not None and mask.requires_grad
    attend = Dropped.apply if dropout and not learned else sdpa
    return attend(q.float(), k.float(), v.float(), mask, dropout, scale).to(q.dtype)


def dense(attend, q, k, v, mask, causal, dropout, scale) -> Tensor:
    """`attend`: plain, sdpa or usual."""
    if causal:
        spare = k.shape[1] - q.shape[1]
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(spare)
        if mask is None:
            mask = seen
        else:
            mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))
    return attend(q, k, v, mask, dropout, scale)


def packed(attend, q, k, v, layout: Layout, key_mask, causal, first, dropout, scale) -> Tensor:
    """Lays texts out in a padded table, attends, and takes them back: padding is computed in here only."""
    images = k.ndim == 4
    queries = layout.queries
    wasteful = queries.height * queries.width > WASTE * layout.T
    if images and wasteful and not causal and key_mask is None and q.device.type == "cpu":
        return _one_by_one(attend, q, k, v, layout, dropout, scale)
    mask, blind = layout.mask(causal, first)
    if key_mask is not None:
        keys = key_mask[:, None, None]
        mask = keys if mask is None else mask & keys
    if not images:
        k, v = layout.keys.lay_out(k), layout.keys.lay_out(v)
    out = (plain if blind else attend)(queries.lay_out(q), k, v, mask, dropout, scale)
    if blind and mask is not None:
        out = torch.where(mask.any(-1).transpose(1, 2)[..., None], out, 0)
    return queries.take_back(out)


def _one_by_one(attend, q, k, v, layout: Layout, dropout, scale) -> Tensor:
    """One product an image, where a few images are read by most of the texts: no padding at all."""
    if layout.rows is not None:
        q = q.index_select(0, layout.rows)
    texts = q.split(layout.query_lengths.tolist())
    every = zip(texts, k.unbind(), v.unbind())  # unbind's backward is one stack; indexing's would be M sums
    out = [
        attend(*(x[None] for x in one), None, dropout, scale)[0] if len(one[0]) else one[0] for one in every
    ]
    return _ungroup(torch.cat(out), layout)


def flash_attn_dense(q, k, v, causal, dropout, scale) -> Tensor:
    from flash_attn import flash_attn_func

    exact = torch.are_deterministic_algorithms_enabled()
    return flash_attn_func(
        q, k, v, dropout_p=dropout, softmax_scale=scale, causal=causal, deterministic=exact
    )


def flash_attn_packed(q, k, v, layout: Layout, causal, dropout, scale) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        *_grouped(q, k, v, layout),
        cu_seqlens_q=layout.query_offsets,
        cu_seqlens_k=layout.key_offsets,
        max_seqlen_q=layout.queries.width,
        max_seqlen_k=layout.keys.width,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return _ungroup(out, layout)


def xformers_dense(q, k, v, causal, dropout, scale) -> Tensor:
    from xformers import ops
    from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask

    bias = LowerTriangularFromBottomRightMask() if causal else None
    return ops.memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout, scale=scale)


def xformers_packed(q, k, v, layout: Layout, causal, dropout, scale) -> Tensor:
    from xformers import ops
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    bias = BlockDiagonalMask.from_seqlens(layout.query_lengths.tolist(), layout.key_lengths.tolist())
    if causal:
        bias = bias.make_causal_from_bottomright()
    q, k, v = (x[None] for x in _grouped(q, k, v, layout))
    return _ungroup(
        ops.memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout, scale=scale)[0], layout
    )


def _grouped(q, k, v, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Queries in the order of the keys they read, and keys packed."""
    if layout.rows is not None:
        q = q.index_select(0, layout.rows)
    return (q, k.flatten(0, 1), v.flatten(0, 1)) if k.ndim == 4 else (q, k, v)


def _ungroup(out: Tensor, layout: Layout) -> Tensor:
    return out if layout.rows is None else torch.empty_like(out).index_copy(0, layout.rows.long(), out)
