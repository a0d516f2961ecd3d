"""Attention: pictures (dense), texts (packed), texts over shared images, beside SDPA's backends and libraries."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Case, compiled, modes, ours, served, size
from benchmarks.targets import Target
from blipfast import backends
from blipfast.ops.attention import Layout, attention_qkv, attention_varlen

# batch, tokens, heads, head size, rank: ViT-B at 224, 384 and 480 pixels, ViT-L at 384
DENSE_ON_GPU = [(75, 197, 12, 64, 0), (64, 577, 12, 64, 0), (24, 901, 12, 64, 1), (32, 577, 16, 64, 1)]
# name, images, tokens of an image (0: the texts over themselves), texts of an image, tokens of a text, dropout, rank:
# pre-training (ITM three times, LM once), a rerank of 256 candidates, beams one token at a time
PACKED_ON_GPU = [
    ("text", 225, 0, 1, (4, 30), 0.1, 1),
    ("causal text", 75, 0, 1, (4, 30), 0.1, 1),
    ("pre-training", 75, 197, 4, (4, 30), 0.1, 0),
    ("pre-training", 64, 577, 4, (4, 30), 0.1, 1),
    ("rerank", 16, 577, 256, (6, 35), 0.0, 1),
    ("beams", 64, 577, 3, (1, 1), 0.0, 1),
]
DENSE_ON_CPU = [(4, 65, 4, 32, 0), (2, 197, 4, 32, 1)]
PACKED_ON_CPU = [("text", 64, 0, 1, (4, 35), 0.0, 0), ("pre-training", 16, 65, 4, (4, 35), 0.0, 0)]
FORWARD, FULL = ((Target("speed", least, ("sdpa",)),) for least in (1.1, 1.0))  # dense, 197 and 577 tokens
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}


def cases(device: str) -> list[Case]:
    gpu = device == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    found = []
    for B, N, H, d, rank in DENSE_ON_GPU if gpu else DENSE_ON_CPU:
        flops, moved = 4 * B * H * N * N * d, 4 * B * N * H * d * size(dtype)
        found += modes(
            "attention", f"dense B{B} N{N} H{H} D{d}", dtype, partial(_dense, device, B, N, H, d, dtype),
            forward=(flops, moved), full=(3.5 * flops, 3 * moved), rank=rank,
            targets=() if rank else FORWARD, full_targets=() if rank else FULL,
        )  # fmt: skip
    H, d = (12, 64) if gpu else (4, 32)
    for name, M, N, each, between, dropout, rank in PACKED_ON_GPU if gpu else PACKED_ON_CPU:
        lengths, index = _texts(M, each, between)
        T, pairs = sum(lengths), sum(n * (N or n) for n in lengths)
        flops = 4 * pairs * H * d // (2 if name.startswith("causal") else 1)
        moved = (2 * T + 2 * (M * N or T)) * H * d * size(dtype)
        shape = f"{name} M{M} N{N} T{T} H{H} D{d}"
        found += modes(
            "attention", shape, dtype, partial(_packed, device, name, lengths, index, M, N, H, d, dropout, dtype),
            forward=(flops, moved), full=None if name == "beams" else (3.5 * flops, 3 * moved), rank=rank,
        )  # fmt: skip
    return found


def _texts(M, each, between):
    """Lengths of texts, and which image each reads: its own, but of every fourth another, as hard negatives do."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(between[0], between[1] + 1, (M * each,), generator=random).tolist()
    index = torch.arange(M).repeat(each)
    index[::4] = torch.randint(M, (len(index[::4]),), generator=random)
    return lengths, index.tolist()


def _dense(device, B, N, H, d, dtype):
    qkv = torch.randn(B, N, 3, H, d, device=device).to(dtype).requires_grad_()

    def formula(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return (((q @ k.transpose(-2, -1)) * d**-0.5).softmax(-1) @ v).transpose(1, 2)

    def by_sdpa(qkv):
        return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)

    contenders = ours("attention", device, attention_qkv) | {"eager": formula, "sdpa": by_sdpa}
    if device == "cuda":
        contenders |= {name: _only(kind, by_sdpa) for name, kind in SDPA.items() if _runs(kind, by_sdpa, qkv)}
    return contenders | _libraries(device, attention_qkv), (qkv,)


def _packed(device, name, lengths, index, M, N, H, d, dropout, dtype):
    """eager: as official BLIP does, texts padded, keys and values repeated for every text."""
    q, *kv = (torch.randn(sum(lengths), H, d, device=device).to(dtype).requires_grad_() for _ in range(3))
    if N:
        kv = [torch.randn(M, N, H, d, device=device).to(dtype).requires_grad_() for _ in range(2)]
    layout = Layout(lengths, [N] * M, index, device=device) if N else Layout(lengths, device=device)
    alone = Layout(lengths, device=device)
    read, causal = torch.tensor(index, device=device), name.startswith("causal")

    def fused(q, k, v):
        return attention_varlen((q, k, v), layout, causal=causal, dropout=dropout)

    def padded(attend, q, k, v):
        q = alone.queries.lay_out(q)
        k, v = (k[read], v[read]) if N else (alone.queries.lay_out(k), alone.queries.lay_out(v))
        mask = None if N else alone.mask(causal, None)[0]
        return alone.queries.take_back(attend(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2))

    def formula(q, k, v, mask):
        scores = (q @ k.transpose(-2, -1)) * d**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -10000.0)
        return F.dropout(scores.softmax(-1), dropout) @ v

    def by_sdpa(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

    eager = partial(padded, formula)
    contenders = ours("attention", device, fused) | {"eager": eager, "sdpa": partial(padded, by_sdpa)}
    return contenders | compiled(device, eager) | _libraries(device, fused), (q, *kv)


def _only(kind, function):
    def run(*inputs):
        with sdpa_kernel(kind):
            return function(*inputs)

    return run


def _runs(kind, function, qkv):
    try:
        _only(kind, function)(qkv.detach()[:1])
    except RuntimeError:  # this PyTorch or this GPU does not have it
        return False
    return True


def _libraries(device, function):
    found = [name for name in ("flash_attn", "xformers") if device == "cuda" and backends.installed(name)]
    return {name: served("attention", name, function) for name in found}
