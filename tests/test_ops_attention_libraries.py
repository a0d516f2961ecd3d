"""Attention by flash_attn and xformers, whose documented functions fp64 stands for."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from blipfast import backends
from blipfast.ops.attention import Layout, attention, attention_varlen
from tests.attention_truth import LENGTHS, READS, by_text, check, expected, random


class FlashAttention:
    """Stands for flash_attn: its documented functions, by fp64."""

    @staticmethod
    def flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, deterministic):
        return torch.stack([expected(*x, softmax_scale, causal) for x in zip(q, k, v)]).to(q)

    @staticmethod
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
    ):
        lengths, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert (max_seqlen_q, max_seqlen_k) == (max(lengths), max(keys))
        return by_text(q, k.split(keys), v.split(keys), lengths, scale=softmax_scale, causal=causal).to(q)


class Bias:
    def __init__(self, queries=None, keys=None, causal=False):
        self.queries, self.keys, self.causal = queries, keys, causal

    @classmethod
    def from_seqlens(cls, queries, keys):
        return cls(queries, keys)

    def make_causal_from_bottomright(self):
        return Bias(self.queries, self.keys, True)


def memory_efficient_attention(q, k, v, attn_bias, p, scale):
    bias = attn_bias or Bias()
    if bias.queries is None:
        return torch.stack([expected(*x, scale, bias.causal) for x in zip(q, k, v)]).to(q)
    k, v = k[0].split(bias.keys), v[0].split(bias.keys)
    return by_text(q[0], k, v, bias.queries, scale=scale, causal=bias.causal).to(q)[None]


@pytest.fixture(params=["flash_attn", "xformers"])
def library(request, monkeypatch):
    ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    biases = SimpleNamespace(
        BlockDiagonalMask=Bias, LowerTriangularFromBottomRightMask=lambda: Bias(causal=True)
    )
    modules = {
        "flash_attn": FlashAttention,
        "xformers": SimpleNamespace(ops=ops),
        "xformers.ops": ops,
        "xformers.ops.fmha": SimpleNamespace(attn_bias=biases),
        "xformers.ops.fmha.attn_bias": biases,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(backends, "installed", lambda package: True)
    with backends.use(attention=request.param):
        yield


@pytest.mark.parametrize("causal", [False, True])
def test_libraries_are_given_the_same_work(causal, library):
    q, k, v = (random(1, 2, 12, 32, seed=i) for i in range(3))
    want = expected(*(x[0].transpose(0, 1) for x in (q, k, v)), causal=causal).transpose(0, 1)[None]
    check(attention(q, k, v, causal=causal), want, (q, k, v))
    q, k, v = (random(sum(LENGTHS), 2, 32, seed=i) for i in range(3))
    want = by_text(q, k.split(LENGTHS), v.split(LENGTHS), LENGTHS, causal=causal)
    check(attention_varlen((q, k, v), Layout(LENGTHS, device="cpu"), causal=causal), want, (q, k, v))
    kv = random(4, 9, 2, 2, 32, seed=1)
    got = attention_varlen((q, *kv.unbind(2)), Layout(LENGTHS, [9] * 4, READS, device="cpu"))
    check(got, by_text(q, *kv.unbind(2), LENGTHS, READS), (q, kv))
    first = attention_varlen((q[:3], q[:3], q[:3]), Layout([3], device="cpu"), causal=True, first=0)
    check(first, expected(q[:3], q[:3], q[:3], causal=True), (q,))
