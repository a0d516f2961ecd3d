"""Attention as a formula in fp64, text by text, and how its tests compare with it."""

from __future__ import annotations

import torch

LENGTHS = [3, 0, 37, 1, 18]
READS = [2, 0, 2, 1, 0]


def random(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype).requires_grad_()
    )


def expected(q, k, v, scale=None, causal=False, first=None, seen=None, keep=None):
    """One text in fp64: q [n, H, d], k and v [m, H, d] -> [n, H, d]. keep [H, n, m]: dropout's mask, scaled."""
    q, k, v = (x.double() for x in (q, k, v))
    n, m = len(q), len(k)
    scores = torch.einsum("nhd,mhd->hnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if seen is None:
        seen = torch.ones(n, m, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(m - n if first is None else first)
    weights = scores.masked_fill(~seen, -1e300).softmax(-1) * seen
    return torch.einsum("hnm,mhd->nhd", weights if keep is None else weights * keep, v)


def gradients(output, tensors):
    given = random(*output.shape, seed=9, device=output.device).to(output)
    return torch.autograd.grad(output, tensors, given, retain_graph=True)


def assert_near(got, want, tolerance=3e-6):
    """Largest error within `tolerance` of the largest value."""
    assert got.shape == want.shape
    if got.numel():
        error = (got.double() - want.double()).abs().max()
        assert error <= tolerance * want.double().abs().max().clamp_min(0.1)  # NaN fails as well


def check(got, want, tensors):
    assert_near(got, want)
    for a, b in zip(gradients(got, tensors), gradients(want, tensors)):
        assert_near(a, b, 1e-5)


def by_text(q, k, v, lengths, index=None, **how):
    """`expected` of packed texts; k and v are lists or dense, one a set of keys."""
    texts = q.split(lengths)
    index = range(len(texts)) if index is None else index
    return torch.cat([expected(x, k[m], v[m], **how) for x, m in zip(texts, index)])
