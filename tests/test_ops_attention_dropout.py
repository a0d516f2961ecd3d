"""Attention's dropout: as often as asked, everywhere alike, and in backward what forward dropped."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from blipfast.ops.attention import Layout, attention_varlen
from tests.attention_truth import check, expected, gradients, random

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    from blipfast.kernels.attention import kept, thresholds

    @triton.jit
    def tell_kept(seed_ptr, out_ptr, threshold, BM: tl.constexpr, BN: tl.constexpr):
        i, j = tl.arange(0, BM), tl.arange(0, BN)
        keep = kept(tl.load(seed_ptr), i.to(tl.int64), 0, threshold, BM, BN)
        out_ptr += tl.program_id(1) * BM * BN
        tl.store(out_ptr + i[:, None] * BN + j[None, :], keep.to(tl.float32))


def kernel_mask(seed, rows, heads, keys, dropout):
    """Which elements the kernels keep, [heads, rows, keys], by asking for them as one tile."""
    BM, BN = triton.next_power_of_2(rows), triton.next_power_of_2(keys)
    out = torch.empty(heads, BM, BN)
    tell_kept[(1, heads)](seed, out, thresholds(dropout)[0], BM, BN)
    return out[:, :rows, :keys]


def test_dropout_is_the_same_in_backward_and_whatever_the_tiles(triton, poison_empty):
    lengths, p = [19, 3, 40], 0.3
    q, k, v = (random(62, 2, 32, seed=i) for i in range(3))
    torch.manual_seed(5)
    seed = torch.randint(2**62, (1,))
    torch.manual_seed(5)
    got = attention_varlen((q, k, v), Layout(lengths, device="cpu"), dropout=p, causal=True)
    keep = kernel_mask(seed, 62, 2, 40, p).split(lengths, 1)
    each = zip(q.split(lengths), k.split(lengths), v.split(lengths), keep)
    want = torch.cat([expected(*x, causal=True, keep=m[:, :, : len(x[0])] / (1 - p)) for *x, m in each])
    check(got, want, (q, k, v))


def test_dropout_drops_as_often_as_asked_and_everywhere_alike(attention_backend):
    """With equal keys the output is the mean of one-hot values over what was kept."""
    T, S, p = 64, 128, 0.25
    q, k = torch.zeros(T, 2, 128), torch.zeros(1, S, 2, 128)
    v = torch.eye(128).repeat_interleave(2, 0).view(1, S, 2, 128)
    torch.manual_seed(0)
    layout = Layout([T // 2] * 2, [S], [0, 0], device="cpu")
    out = [attention_varlen((q, k, v), layout, dropout=p) for _ in range(2)]
    assert sorted(out[0].unique().mul(S).tolist()) == pytest.approx([0.0, 1 / (1 - p)])
    dropped, again = ((x == 0).double() for x in out)
    deviation = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean() - p) < 4 * deviation / dropped.numel() ** 0.5
    assert ((dropped.mean((0, 1)) - p).abs() < 5 * deviation / (2 * T) ** 0.5).all()
    assert ((dropped.mean((1, 2)) - p).abs() < 5 * deviation / (2 * S) ** 0.5).all()
    x, y = (dropped - p) / deviation, (again - p) / deviation
    for product in (
        x[1:] * x[:-1],
        x[:, 0] * x[:, 1],
        x[..., 1:] * x[..., :-1],
        x[..., 4:] * x[..., :-4],
        x * y,
    ):
        assert abs(product.mean()) < 4 / product.numel() ** 0.5


def test_checkpointing_gives_the_same_gradients_under_dropout(attention_backend):
    q, k, v = (random(20, 2, 32, seed=i) for i in range(3))
    layout = Layout([13, 7], device="cpu")

    def run(q, k, v):
        return attention_varlen((q, k, v), layout, dropout=0.5)

    torch.manual_seed(1)
    want = gradients(run(q, k, v), (q, k, v))
    torch.manual_seed(1)
    got = gradients(checkpoint(run, q, k, v, use_reentrant=False), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
