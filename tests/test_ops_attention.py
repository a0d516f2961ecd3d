"""Attention: every backend that runs here against plain fp64, text by text."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from blipfast import backends
from blipfast.ops.attention import Layout, attention, attention_qkv, attention_varlen

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


LENGTHS = [3, 0, 37, 1, 18]
READS = [2, 0, 2, 1, 0]


@pytest.fixture(params=["torch", "sdpa", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    with backends.use(attention=request.param):
        yield request.param


@pytest.fixture
def kernel():
    pytest.importorskip("triton")
    with backends.use(attention="triton"):
        yield


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


@pytest.mark.parametrize("N, S, d", [(1, 1, 32), (5, 50, 32), (37, 17, 64), (33, 197, 32), (9, 33, 128)])
def test_dense_attention_and_its_gradients_are_those_of_fp64(N, S, d, backend, poison_empty):
    q, k, v = random(2, 2, N, d), random(2, 2, S, d, seed=1), random(2, 2, S, d, seed=2)
    got = attention(q, k, v)
    want = torch.stack([expected(*(x.transpose(0, 1) for x in one)) for one in zip(q, k, v)]).transpose(1, 2)
    check(got, want, (q, k, v))


@pytest.mark.parametrize("N, S", [(21, 21), (5, 40)])
def test_dense_causal_attention_ends_at_the_last_key(N, S, backend, poison_empty):
    q, k, v = (random(1, 2, n, 32, seed=n) for n in (N, S, S))
    want = expected(*(x[0].transpose(0, 1) for x in (q, k, v)), causal=True).transpose(0, 1)[None]
    check(attention(q, k, v, causal=True), want, (q, k, v))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_views_of_one_projection_give_one_gradient(scale, backend, poison_empty):
    qkv = random(2, 21, 3, 2, 32)
    want = torch.stack([expected(*one.unbind(1), scale=scale) for one in qkv])
    check(attention_qkv(qkv, scale=scale), want, (qkv,))
    views = qkv.permute(2, 0, 3, 1, 4)
    check(attention(*views, scale=scale).transpose(1, 2), want, (qkv,))
    spread = random(2, 3, 2, 32, 21).permute(0, 4, 1, 2, 3)  # the last stride is not 1
    check(attention_qkv(spread), torch.stack([expected(*one.unbind(1)) for one in spread]), (spread,))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, [7, 7, 7], [1]])
def test_packed_texts_attend_to_themselves(lengths, causal, backend, poison_empty):
    T = sum(lengths)
    q, k, v = (random(T, 2, 32, seed=i) for i in range(3))
    got = attention_varlen(q, k, v, Layout(lengths, device="cpu"), causal=causal)
    check(got, by_text(q, k.split(lengths), v.split(lengths), lengths, causal=causal), (q, k, v))


@pytest.mark.parametrize("first", [None, 0, 2, 3, 30])
def test_part_of_a_text_sees_the_keys_up_to_its_place(first, backend, poison_empty):
    queries, keys = [2, 1, 17, 16], [5, 3, 20, 40]
    q, k, v = random(36, 2, 32), random(68, 2, 32, seed=1), random(68, 2, 32, seed=2)
    got = attention_varlen(q, k, v, Layout(queries, keys, device="cpu"), causal=True, first=first)
    want = by_text(q, k.split(keys), v.split(keys), queries, causal=True, first=first)
    check(got, want, (q, k, v))


@pytest.mark.parametrize("N", [5, 35, 49])
@pytest.mark.parametrize("index", [None, READS, [0, 0, 0, 0, 0]])
def test_texts_share_images_in_any_order(N, index, backend, poison_empty):
    M = 4 if index else 5
    q, kv = random(sum(LENGTHS), 2, 32), random(M, N, 2, 2, 32, seed=1)
    k, v = kv.unbind(2)
    got = attention_varlen(q, k, v, Layout(LENGTHS, [N] * M, index, device="cpu"))
    check(got, by_text(q, k, v, LENGTHS, index), (q, kv))
    if index:
        assert not gradients(got_again(q, k, v, N, M, index), (kv,))[0][3].any()  # an image nobody reads


def got_again(q, k, v, N, M, index):
    return attention_varlen(q, k, v, Layout(LENGTHS, [N] * M, index, device="cpu"))


@pytest.mark.parametrize("keys", [[9, 40, 1], [0, 6, 16]])
def test_texts_share_other_texts_even_empty_ones(keys, backend, poison_empty):
    q, k, v = random(sum(LENGTHS), 2, 32), random(sum(keys), 2, 32, seed=1), random(sum(keys), 2, 32, seed=2)
    got = attention_varlen(q, k, v, Layout(LENGTHS, keys, READS, device="cpu"))
    check(got, by_text(q, k.split(keys), v.split(keys), LENGTHS, READS), (q, k, v))


def test_texts_may_read_each_other(backend, poison_empty):
    q, k, v = (random(sum(LENGTHS), 2, 32, seed=i) for i in range(3))
    index = [2, 0, 4, 1, 0]
    got = attention_varlen(q, k, v, Layout(LENGTHS, LENGTHS, index, device="cpu"))
    check(got, by_text(q, k.split(LENGTHS), v.split(LENGTHS), LENGTHS, index), (q, k, v))


def test_a_query_that_sees_nothing_gets_zero_and_gives_none(backend, poison_empty):
    queries, keys = [20, 4], [3, 9]
    q, k, v = random(24, 2, 32), random(12, 2, 32, seed=1), random(12, 2, 32, seed=2)
    got = attention_varlen(q, k, v, Layout(queries, keys, device="cpu"), causal=True)
    assert not got[:17].any() and got[17:].all()
    check(got, by_text(q, k.split(keys), v.split(keys), queries, causal=True), (q, k, v))


def test_nothing_in_gives_nothing_out(backend):
    for B, N, S in [(0, 5, 5), (2, 0, 5), (2, 5, 0)]:
        q, k, v = random(B, 2, N, 32), random(B, 2, S, 32), random(B, 2, S, 32)
        out = attention(q, k, v)
        assert out.shape == q.shape and not out.any()
        assert not any(g.any() for g in gradients(out, (q, k, v)))
    for layout, S in [(Layout([], device="cpu"), 0), (Layout([0, 0], [3, 0], device="cpu"), 3)]:
        q, k, v = random(0, 2, 32), random(S, 2, 32), random(S, 2, 32)
        out = attention_varlen(q, k, v, layout)
        assert out.shape == q.shape and not any(g.any() for g in gradients(out, (q, k, v)))


def test_more_segments_than_one_search_step_sees(kernel, poison_empty):
    lengths = [1, 0, 2] * 43
    q, k, v = (random(129, 1, 32, seed=i) for i in range(3))
    got = attention_varlen(q, k, v, Layout(lengths, device="cpu"))
    check(got, by_text(q, k.split(lengths), v.split(lengths), lengths), (q, k, v))


def test_masks_go_to_pytorch_whatever_serves(backend):
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
        packed, *images, Layout([3, 4, 1], [60, 60], [1, 0, 1], device="cpu"), key_mask=key_mask
    )
    texts = zip(packed.split([3, 4, 1]), [1, 0, 1])
    want = torch.cat(
        [expected(x, images[0][m], images[1][m], seen=key_mask[m].expand(len(x), -1)) for x, m in texts]
    )
    check(got, want, (packed, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_at_most_twice_plain_torch(dtype, backend, poison_empty):
    if (backend, dtype) == ("triton", torch.bfloat16):
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
    packed = attention_varlen(q, k, v, Layout([N], [S], device=device))
    for got in (dense, packed):
        assert got.dtype == dtype
        found = zip((got, *gradients(got, (q, k, v))), (want, *gradients(want, (q, k, v))))
        for (a, b), c in zip(found, (plain, *gradients(plain, (q, k, v)))):
            assert (a.double() - b).abs().max() <= 2 * (c.double() - b).abs().max() + 1e-5


def kernel_mask(seed, rows, heads, keys, dropout):
    """Which elements the kernels keep, [heads, rows, keys], by asking for them as one tile."""
    BM, BN = triton.next_power_of_2(rows), triton.next_power_of_2(keys)
    out = torch.empty(heads, BM, BN)
    tell_kept[(1, heads)](seed, out, thresholds(dropout)[0], BM, BN)
    return out[:, :rows, :keys]


def test_dropout_is_the_same_in_backward_and_whatever_the_tiles(kernel, poison_empty):
    lengths, p = [19, 3, 40], 0.3
    q, k, v = (random(62, 2, 32, seed=i) for i in range(3))
    torch.manual_seed(5)
    seed = torch.randint(2**62, (1,))
    torch.manual_seed(5)
    got = attention_varlen(q, k, v, Layout(lengths, device="cpu"), dropout=p, causal=True)
    keep = kernel_mask(seed, 62, 2, 40, p).split(lengths, 1)
    each = zip(q.split(lengths), k.split(lengths), v.split(lengths), keep)
    want = torch.cat([expected(*x, causal=True, keep=m[:, :, : len(x[0])] / (1 - p)) for *x, m in each])
    check(got, want, (q, k, v))


def test_dropout_drops_as_often_as_asked_and_everywhere_alike(backend):
    """With equal keys the output is the mean of one-hot values over what was kept."""
    T, S, p = 64, 128, 0.25
    q, k = torch.zeros(T, 2, 128), torch.zeros(1, S, 2, 128)
    v = torch.eye(128).repeat_interleave(2, 0).view(1, S, 2, 128)
    torch.manual_seed(0)
    layout = Layout([T // 2] * 2, [S], [0, 0], device="cpu")
    out = [attention_varlen(q, k, v, layout, dropout=p) for _ in range(2)]
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


def test_checkpointing_gives_the_same_gradients_under_dropout(backend):
    q, k, v = (random(20, 2, 32, seed=i) for i in range(3))
    layout = Layout([13, 7], device="cpu")

    def run(q, k, v):
        return attention_varlen(q, k, v, layout, dropout=0.5)

    torch.manual_seed(1)
    want = gradients(run(q, k, v), (q, k, v))
    torch.manual_seed(1)
    got = gradients(checkpoint(run, q, k, v, use_reentrant=False), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_operators_say_truly_what_comes_out(kernel):
    ops = torch.ops.blipfast
    settings = (0.2, 0.1, False, -1)
    seed, rows = torch.tensor([3]), torch.tensor([4, 0, 1, 2, 3], dtype=torch.int32)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    q, kv = random(5, 2, 32).detach(), random(2, 9, 2, 2, 32).detach()
    places = (offsets, None, rows, seed)
    qkv = random(2, 5, 3, 2, 32).detach()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.attention_forward, (q, *kv.unbind(2), *places, *settings), test_utils=tests)
    o, lse = ops.attention_forward(q, *kv.unbind(2), *places, *settings)
    backward = (torch.ones_like(o), q, *kv.unbind(2), o, lse, *places, *settings)
    torch.library.opcheck(ops.attention_backward, backward, test_utils=tests)
    o, lse = ops.attention_forward(*qkv.unbind(2), None, None, None, None, 0.2, 0.0, True, -1)
    torch.library.opcheck(
        ops.attention_qkv_backward, (torch.ones_like(o), qkv, o, lse, None, 0.2, 0.0), test_utils=tests
    )


def test_compiles_as_one_graph(backend):
    layout, images = Layout([3, 4], device="cpu"), Layout([3, 4], [9, 9], [1, 0], device="cpu")

    def block(qkv, text, kv):
        dense = attention_qkv(qkv)
        packed = attention_varlen(*text.unbind(1), layout, causal=True)
        shared = attention_varlen(packed, *kv.unbind(2), images)
        return dense.sum() + (shared * packed).sum()

    tensors = random(2, 5, 3, 2, 32), random(7, 3, 2, 32, seed=1), random(2, 9, 2, 2, 32, seed=2)
    want = block(*tensors)
    got = torch.compile(block, backend="aot_eager", fullgraph=True)(*tensors)
    assert_near(got, want)
    for a, b in zip(torch.autograd.grad(got, tensors), torch.autograd.grad(want, tensors)):
        assert_near(a, b, 1e-5)


def test_autocast_casts_what_comes_in():
    q, k, v = (random(1, 2, 5, 32, seed=i) for i in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q, k, v).dtype == torch.bfloat16
        assert (
            attention_qkv(torch.stack([x[0].transpose(0, 1) for x in (q, k, v)], 1)[None]).dtype
            == torch.bfloat16
        )


def bad_calls():
    q, kv, layout = random(5, 2, 32), random(2, 9, 2, 32), Layout([3, 2], [9, 9], device="cpu")
    text = Layout([3, 2], device="cpu")
    dense = random(1, 2, 5, 32)
    return [
        ("must have key's shape", lambda: attention(dense, dense, dense[:, :, :4])),
        (r"\[B, H, N, d\]", lambda: attention(dense, dense[:, :1], dense[:, :1])),
        (r"\[B, H, N, d\]", lambda: attention(q, q, q)),
        ("query must be one of", lambda: attention(dense.double(), dense, dense)),
        ("query is torch.float32", lambda: attention(dense, dense.half(), dense.half())),
        ("scale must be positive", lambda: attention(dense, dense, dense, scale=-1.0)),
        ("below 1", lambda: attention(dense, dense, dense, dropout=1.0)),
        ("at least as many keys", lambda: attention(dense, dense[:, :, :4], dense[:, :, :4], causal=True)),
        (r"\[B, N, 3, H, d\]", lambda: attention_qkv(dense)),
        (r"query must be \[5, H, d\]", lambda: attention_varlen(q[:4], q, q, text)),
        (r"key must be \[5, 2, 32\]", lambda: attention_varlen(q, q[:4], q[:4], text)),
        ("as its layout says", lambda: attention_varlen(q, kv[:1], kv[:1], layout)),
        ("as its layout says", lambda: attention_varlen(q, kv[:, :8], kv[:, :8], layout)),
        (
            "its own keys",
            lambda: attention_varlen(q, kv, kv, Layout([3, 2], [9, 9], [0, 0], device="cpu"), causal=True),
        ),
        ("first is the place", lambda: attention_varlen(q, q, q, text, first=0)),
        ("first is the place", lambda: attention_varlen(q, q, q, text, causal=True, first=-1)),
        ("key_mask must be bool", lambda: attention_varlen(q, kv, kv, layout, key_mask=torch.ones(2, 9))),
        (
            "make it for that device",
            lambda: attention_varlen(q, kv, kv, Layout([3, 2], [9, 9], device="meta")),
        ),
        ("by `index`", lambda: Layout([3, 2], [9], device="cpu")),
        ("one of 1 sets", lambda: Layout([3, 2], [9], [0, 1], device="cpu")),
        ("not be negative", lambda: Layout([3, -2], device="cpu")),
        ("whole numbers", lambda: Layout([3.5, 2.0], device="cpu")),
    ]


@pytest.mark.parametrize("case", range(len(bad_calls())))
def test_wrong_inputs_are_named(case):
    message, call = bad_calls()[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_kernel_says_which_head_sizes_it_has(kernel):
    q = random(1, 2, 5, 48)
    with pytest.raises(ValueError, match="head sizes"):
        attention(q, q, q)
    with pytest.raises(ValueError, match="head sizes"):
        attention_qkv(random(1, 5, 3, 2, 48))


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
    check(attention_varlen(q, k, v, Layout(LENGTHS, device="cpu"), causal=causal), want, (q, k, v))
    kv = random(4, 9, 2, 2, 32, seed=1)
    got = attention_varlen(q, *kv.unbind(2), Layout(LENGTHS, [9] * 4, READS, device="cpu"))
    check(got, by_text(q, *kv.unbind(2), LENGTHS, READS), (q, kv))
    first = attention_varlen(q[:3], q[:3], q[:3], Layout([3], device="cpu"), causal=True, first=0)
    check(first, expected(q[:3], q[:3], q[:3], causal=True), (q,))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "N, S, d", [(197, 197, 64), (577, 577, 64), (197, 197, 32), (70, 300, 128), (12, 577, 64)]
)
def test_on_a_gpu_errors_stay_within_twice_plain_torch(dtype, N, S, d, kernel):
    compare_with_plain(dtype, "cuda", 12, N, S, d)


@pytest.mark.gpu
@pytest.mark.parametrize("causal, index", [(True, None), (False, None), (False, [1, 0, 1, 1, 2, 0] * 20)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_on_a_gpu_fifty_runs_are_identical(causal, index, dropout, kernel):
    lengths = [12, 35, 4, 1, 20, 30] * 20
    q = random(sum(lengths), 12, 64, dtype=torch.bfloat16, device="cuda")
    if index:
        k, v = (random(3, 577, 12, 64, seed=i, dtype=torch.bfloat16, device="cuda") for i in (1, 2))
    else:
        k, v = (random(sum(lengths), 12, 64, seed=i, dtype=torch.bfloat16, device="cuda") for i in (1, 2))
    layout = Layout(lengths, [577] * 3 if index else None, index, device="cuda")

    def run():
        torch.manual_seed(0)
        out = attention_varlen(q, k, v, layout, causal=causal, dropout=dropout)
        return [out, *gradients(out, (q, k, v))]

    want = run()
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(run(), want))


@pytest.mark.gpu
def test_on_a_gpu_packed_texts_equal_sdpa(kernel):
    lengths = [12, 35, 4, 1, 20, 30]
    layout = Layout(lengths, [197] * 3, [0, 2, 1, 1, 0, 2], device="cuda")
    q = random(sum(lengths), 12, 64, dtype=torch.bfloat16, device="cuda")
    k, v = (random(3, 197, 12, 64, seed=i, dtype=torch.bfloat16, device="cuda") for i in (1, 2))
    got = attention_varlen(q, k, v, layout)
    want = by_text(q, k, v, lengths, [0, 2, 1, 1, 0, 2])
    assert_near(got, want, 0.02)
    for a, b in zip(gradients(got, (q, k, v)), gradients(want, (q, k, v))):
        assert_near(a, b, 0.02)


@pytest.mark.gpu
def test_on_a_gpu_more_elements_than_int32_are_right(kernel):
    B, N, H, d = 2800, 577, 12, 64  # 3.7e9 elements of q, k and v together
    qkv = torch.randn(B, N, 3, H, d, device="cuda", dtype=torch.bfloat16)
    got = attention_qkv(qkv)[-1]
    q, k, v = (x.transpose(0, 1)[None] for x in qkv[-1].unbind(1))
    assert_near(got, F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1), 0.02)
