"""Attention: every backend that runs here against plain fp64, text by text."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from blipfast.ops import attention_torch
from blipfast.ops.attention import Layout, attention, attention_qkv, attention_varlen
from tests.attention_truth import LENGTHS, READS, assert_near, by_text, check, expected, gradients, random


@pytest.mark.parametrize("N, S, d", [(1, 1, 32), (5, 50, 32), (37, 17, 64), (33, 197, 32), (9, 33, 128)])
def test_dense_attention_and_its_gradients_are_those_of_fp64(N, S, d, attention_backend, poison_empty):
    q, k, v = random(2, 2, N, d), random(2, 2, S, d, seed=1), random(2, 2, S, d, seed=2)
    got = attention(q, k, v)
    want = torch.stack([expected(*(x.transpose(0, 1) for x in one)) for one in zip(q, k, v)]).transpose(1, 2)
    check(got, want, (q, k, v))


@pytest.mark.parametrize("scores", [1, 40**2, 3 * 40**2, 10**9])  # one head at a time, ..., all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_in_parts_the_formula_is_the_same(scores, dtype, monkeypatch, poison_empty):
    """As CPUs do it that multiply bf16 by AVX-512: errors within twice those of plain PyTorch."""
    monkeypatch.setattr(attention_torch, "SCORES", scores)
    monkeypatch.setattr(attention_torch, "products_win", lambda dtype: True)
    called, in_parts = [], attention_torch.in_parts
    monkeypatch.setattr(attention_torch, "in_parts", lambda *args: called.append(1) or in_parts(*args))
    qkv = random(3, 40, 3, 2, 32).to(dtype)
    want = torch.stack([expected(*one.unbind(1)) for one in qkv])
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    plain = ((q * 32**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2)
    assert (attention_qkv(qkv) - want).abs().max() <= 2 * (plain - want).abs().max() + 1e-6
    assert called
    attention_qkv(qkv, dropout=0.5), attention(q, k, v, torch.ones(40, 40).bool()), attention_qkv(qkv[:, :31])
    assert len(called) == 1, "dropout, masks and few tokens go another way"


@pytest.mark.parametrize("N, S", [(21, 21), (5, 40)])
def test_dense_causal_attention_ends_at_the_last_key(N, S, attention_backend, poison_empty):
    q, k, v = (random(1, 2, n, 32, seed=n) for n in (N, S, S))
    want = expected(*(x[0].transpose(0, 1) for x in (q, k, v)), causal=True).transpose(0, 1)[None]
    check(attention(q, k, v, causal=True), want, (q, k, v))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_views_of_one_projection_give_one_gradient(scale, attention_backend, poison_empty):
    qkv = random(2, 21, 3, 2, 32)
    want = torch.stack([expected(*one.unbind(1), scale=scale) for one in qkv])
    check(attention_qkv(qkv, scale=scale), want, (qkv,))
    views = qkv.permute(2, 0, 3, 1, 4)
    check(attention(*views, scale=scale).transpose(1, 2), want, (qkv,))
    spread = random(2, 3, 2, 32, 21).permute(0, 4, 1, 2, 3)  # the last stride is not 1
    check(attention_qkv(spread), torch.stack([expected(*one.unbind(1)) for one in spread]), (spread,))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, [7, 7, 7], [1]])
def test_packed_texts_attend_to_themselves(lengths, causal, attention_backend, poison_empty):
    T = sum(lengths)
    q, k, v = (random(T, 2, 32, seed=i) for i in range(3))
    got = attention_varlen((q, k, v), Layout(lengths, device="cpu"), causal=causal)
    check(got, by_text(q, k.split(lengths), v.split(lengths), lengths, causal=causal), (q, k, v))


@pytest.mark.parametrize("first", [None, 0, 2, 3, 30])
def test_part_of_a_text_sees_the_keys_up_to_its_place(first, attention_backend, poison_empty):
    queries, keys = [2, 1, 17, 16], [5, 3, 20, 40]
    q, k, v = random(36, 2, 32), random(68, 2, 32, seed=1), random(68, 2, 32, seed=2)
    got = attention_varlen((q, k, v), Layout(queries, keys, device="cpu"), causal=True, first=first)
    want = by_text(q, k.split(keys), v.split(keys), queries, causal=True, first=first)
    check(got, want, (q, k, v))


@pytest.mark.parametrize("N", [5, 35, 49])
@pytest.mark.parametrize("index", [None, READS, [0, 0, 0, 0, 0]])
def test_texts_share_images_in_any_order(N, index, attention_backend, poison_empty):
    M = 4 if index else 5
    q, kv = random(sum(LENGTHS), 2, 32), random(M, N, 2, 2, 32, seed=1)
    k, v = kv.unbind(2)
    got = attention_varlen((q, k, v), Layout(LENGTHS, [N] * M, index, device="cpu"))
    check(got, by_text(q, k, v, LENGTHS, index), (q, kv))
    if index:
        assert not gradients(got_again(q, k, v, N, M, index), (kv,))[0][3].any()  # an image nobody reads


def got_again(q, k, v, N, M, index):
    return attention_varlen((q, k, v), Layout(LENGTHS, [N] * M, index, device="cpu"))


@pytest.mark.parametrize("keys", [[9, 40, 1], [0, 6, 16]])
def test_texts_share_other_texts_even_empty_ones(keys, attention_backend, poison_empty):
    q, k, v = random(sum(LENGTHS), 2, 32), random(sum(keys), 2, 32, seed=1), random(sum(keys), 2, 32, seed=2)
    got = attention_varlen((q, k, v), Layout(LENGTHS, keys, READS, device="cpu"))
    check(got, by_text(q, k.split(keys), v.split(keys), LENGTHS, READS), (q, k, v))


def test_texts_may_read_each_other(attention_backend, poison_empty):
    q, k, v = (random(sum(LENGTHS), 2, 32, seed=i) for i in range(3))
    index = [2, 0, 4, 1, 0]
    got = attention_varlen((q, k, v), Layout(LENGTHS, LENGTHS, index, device="cpu"))
    check(got, by_text(q, k.split(LENGTHS), v.split(LENGTHS), LENGTHS, index), (q, k, v))


def test_a_query_that_sees_nothing_gets_zero_and_gives_none(attention_backend, poison_empty):
    queries, keys = [20, 4], [3, 9]
    q, k, v = random(24, 2, 32), random(12, 2, 32, seed=1), random(12, 2, 32, seed=2)
    got = attention_varlen((q, k, v), Layout(queries, keys, device="cpu"), causal=True)
    assert not got[:17].any() and got[17:].all()
    check(got, by_text(q, k.split(keys), v.split(keys), queries, causal=True), (q, k, v))


def test_nothing_in_gives_nothing_out(attention_backend):
    for B, N, S in [(0, 5, 5), (2, 0, 5), (2, 5, 0)]:
        q, k, v = random(B, 2, N, 32), random(B, 2, S, 32), random(B, 2, S, 32)
        out = attention(q, k, v)
        assert out.shape == q.shape and not out.any()
        assert not any(g.any() for g in gradients(out, (q, k, v)))
    for layout, S in [(Layout([], device="cpu"), 0), (Layout([0, 0], [3, 0], device="cpu"), 3)]:
        q, k, v = random(0, 2, 32), random(S, 2, 32), random(S, 2, 32)
        out = attention_varlen((q, k, v), layout)
        assert out.shape == q.shape and not any(g.any() for g in gradients(out, (q, k, v)))


def test_more_segments_than_one_search_step_sees(triton, poison_empty):
    lengths = [1, 0, 2] * 43
    q, k, v = (random(129, 1, 32, seed=i) for i in range(3))
    got = attention_varlen((q, k, v), Layout(lengths, device="cpu"))
    check(got, by_text(q, k.split(lengths), v.split(lengths), lengths), (q, k, v))


def test_masks_go_to_pytorch_whatever_serves(attention_backend):
    q, k, v = random(2, 2, 5, 32), random(2, 2, 60, 32, seed=1), random(2, 2, 60, 32, seed=2)
    seen = torch.rand(2, 1, 5, 60, generator=torch.Generator().manual_seed(3)) < 0.5
    want = torch.stack(
        [expected(*(x[b].transpose(0, 1) for x in (q, k, v)), seen=seen[b, 0]) for b in range(2)]
    ).transpose(1, 2)
    for mask in (seen, torch.zeros(seen.shape).masked_fill(~seen, -1e9)):
        check(attention(q, k, v, mask), want, (q, k, v))
    key_mask, packed = seen[:, 0, 0], random(8, 2, 32)
    images = k.transpose(1, 2), v.transpose(1, 2)
    got = attention_varlen(
        (packed, *images), Layout([3, 4, 1], [60, 60], [1, 0, 1], device="cpu"), key_mask=key_mask
    )
    texts = zip(packed.split([3, 4, 1]), [1, 0, 1])
    want = torch.cat(
        [expected(x, images[0][m], images[1][m], seen=key_mask[m].expand(len(x), -1)) for x, m in texts]
    )
    check(got, want, (packed, k, v))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("S", [60, 577])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_additive_masks_in_fp32_serve_half_precision(dtype, S, grad, attention_backend):
    """Also where a text is all padding, of which a mask of transformers makes fp32's least number."""
    if dtype == torch.bfloat16 and attention_backend == "triton":
        pytest.skip("the interpreter's bfloat16 is wrong")
    q, k, v = (random(2, 2, n, 32, seed=n).to(dtype) for n in (5, S, S))
    seen = torch.rand(2, 1, 1, S, generator=torch.Generator().manual_seed(3)) < 0.5
    seen[1] = False
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.set_grad_enabled(grad):
        got = attention(q, k, v, mask)
        want = attention(q[:1], k[:1], v[:1], seen[:1])
    assert got.isfinite().all()
    torch.testing.assert_close(got[:1], want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_at_most_twice_plain_torch(dtype, attention_backend, poison_empty):
    if (attention_backend, dtype) == ("triton", torch.bfloat16):
        pytest.skip("the interpreter's bfloat16 is wrong")
    compare_with_plain(dtype, "cpu")


def compare_with_plain(dtype, device, H=2, N=37, S=50, d=64):
    """Dense and packed, forward and backward, against fp64; plain: the formula in the same dtype."""
    q, k, v = (random(n, H, d, seed=n, dtype=dtype, device=device) for n in (N, S, S + 1))
    v = v[:S].detach().requires_grad_()
    scores = torch.einsum("nhd,mhd->hnm", q, k) * d**-0.5
    plain = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v)
    want = expected(q, k, v)
    dense = attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)
    packed = attention_varlen((q, k, v), Layout([N], [S], device=device))
    for got in (dense, packed):
        assert got.dtype == dtype
        found = zip((got, *gradients(got, (q, k, v))), (want, *gradients(want, (q, k, v))))
        for (a, b), c in zip(found, (plain, *gradients(plain, (q, k, v)))):
            assert (a.double() - b).abs().max() <= 2 * (c.double() - b).abs().max() + 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "N, S, d", [(197, 197, 64), (577, 577, 64), (197, 197, 32), (70, 300, 128), (12, 577, 64)]
)
def test_on_a_gpu_errors_stay_within_twice_plain_torch(dtype, N, S, d, triton):
    compare_with_plain(dtype, "cuda", 12, N, S, d)


@pytest.mark.gpu
@pytest.mark.parametrize("causal, index", [(True, None), (False, None), (False, [1, 0, 1, 1, 2, 0] * 20)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_on_a_gpu_fifty_runs_are_identical(causal, index, dropout, triton):
    lengths = [12, 35, 4, 1, 20, 30] * 20
    q = random(sum(lengths), 12, 64, dtype=torch.bfloat16, device="cuda")
    if index:
        k, v = (random(3, 577, 12, 64, seed=i, dtype=torch.bfloat16, device="cuda") for i in (1, 2))
    else:
        k, v = (random(sum(lengths), 12, 64, seed=i, dtype=torch.bfloat16, device="cuda") for i in (1, 2))
    layout = Layout(lengths, [577] * 3 if index else None, index, device="cuda")

    def run():
        torch.manual_seed(0)
        out = attention_varlen((q, k, v), layout, causal=causal, dropout=dropout)
        return [out, *gradients(out, (q, k, v))]

    want = run()
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(run(), want))


@pytest.mark.gpu
def test_on_a_gpu_packed_texts_equal_sdpa(triton):
    lengths = [12, 35, 4, 1, 20, 30]
    layout = Layout(lengths, [197] * 3, [0, 2, 1, 1, 0, 2], device="cuda")
    q = random(sum(lengths), 12, 64, dtype=torch.bfloat16, device="cuda")
    k, v = (random(3, 197, 12, 64, seed=i, dtype=torch.bfloat16, device="cuda") for i in (1, 2))
    got = attention_varlen((q, k, v), layout)
    want = by_text(q, k, v, lengths, [0, 2, 1, 1, 0, 2])
    assert_near(got, want, 0.02)
    for a, b in zip(gradients(got, (q, k, v)), gradients(want, (q, k, v))):
        assert_near(a, b, 0.02)


@pytest.mark.gpu
def test_on_a_gpu_more_elements_than_int32_are_right(triton):
    B, N, H, d = 2800, 577, 12, 64  # 3.7e9 elements of q, k and v together
    qkv = torch.randn(B, N, 3, H, d, device="cuda", dtype=torch.bfloat16)
    got = attention_qkv(qkv)[-1]
    q, k, v = (x.transpose(0, 1)[None] for x in qkv[-1].unbind(1))
    assert_near(got, F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1), 0.02)
