"""How attention may be called: compiled, under autocast, as an operator; and what is refused."""

from __future__ import annotations

import pytest
import torch

from blipfast.ops.attention import Layout, attention, attention_qkv, attention_varlen
from tests.attention_truth import assert_near, random


def test_operators_say_truly_what_comes_out(triton):
    ops = torch.ops.blipfast
    settings = (0.2, 0.1, False, -1)
    seed, rows = torch.tensor([3]), torch.tensor([4, 0, 1, 2, 3], dtype=torch.int32)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    q, kv = random(5, 2, 32).detach(), random(2, 9, 2, 2, 32).detach()
    places = (offsets, None, rows, seed)
    qkv = random(2, 5, 3, 2, 32).detach()
    tests = ("test_schema", "test_faketensor")
    dense = (None, None, None, None, 0.2, 0.0, True, -1)
    texts_read_images = (*places, *settings)
    for parts, how in (([q, *kv.unbind(2)], texts_read_images), ([q, kv], texts_read_images), ([qkv], dense)):
        torch.library.opcheck(ops.attention_forward, (parts, *how), test_utils=tests)
        o, lse = ops.attention_forward(parts, *how)
        torch.library.opcheck(
            ops.attention_backward, (parts, torch.ones_like(o), o, lse, *how), test_utils=tests
        )


def test_compiles_as_one_graph(attention_backend):
    layout, images = Layout([3, 4], device="cpu"), Layout([3, 4], [9, 9], [1, 0], device="cpu")

    def block(qkv, text, kv):
        dense = attention_qkv(qkv)
        packed = attention_varlen(text.unbind(1), layout, causal=True)
        shared = attention_varlen((packed, *kv.unbind(2)), images)
        return dense.sum() + (shared * packed).sum()

    tensors = random(2, 5, 3, 2, 32), random(7, 3, 2, 32, seed=1), random(2, 9, 2, 2, 32, seed=2)
    want = block(*tensors)
    got = torch.compile(block, backend="aot_eager", fullgraph=True)(*tensors)
    assert_near(got, want)
    for a, b in zip(torch.autograd.grad(got, tensors), torch.autograd.grad(want, tensors)):
        assert_near(a, b, 1e-5)


@torch.no_grad()
def test_compiles_as_one_graph_where_the_processor_decides():
    qkv = random(2, 40, 3, 2, 32).to(torch.bfloat16)
    got = torch.compile(attention_qkv, backend="aot_eager", fullgraph=True)(qkv)
    assert_near(got, attention_qkv(qkv), 1e-2)


def test_what_one_projection_made_may_stay_together(attention_backend):
    """Results and gradients are those of queries, keys and values apart; a gradient is one tensor."""
    qkv, kv = random(7, 3, 2, 32), random(2, 9, 2, 2, 32, seed=1)
    text, images = Layout([3, 4], device="cpu"), Layout([3, 4], [9, 9], [1, 0], device="cpu")
    q = qkv[:, 0].detach().requires_grad_()
    for joined, parted, layout in (([qkv], qkv.unbind(1), text), ([q, kv], (q, *kv.unbind(2)), images)):
        got, want = attention_varlen(joined, layout), attention_varlen(parted, layout)
        assert torch.equal(got, want)
        weights = torch.randn_like(got)
        for a, b in zip(
            *(torch.autograd.grad((x * weights).sum(), joined) for x in (got, want)), strict=True
        ):
            assert torch.equal(a, b) and a.is_contiguous()


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
        (r"key must have shape \[1, 2, any, 32\]", lambda: attention(dense, dense[:, :1], dense[:, :1])),
        (r"query must have shape \[any, any, any, any\]", lambda: attention(q, q, q)),
        ("must be one of", lambda: attention(dense.double(), dense, dense)),
        ("query is torch.float32", lambda: attention(dense, dense.half(), dense.half())),
        ("scale must be positive", lambda: attention(dense, dense, dense, scale=-1.0)),
        ("below 1", lambda: attention(dense, dense, dense, dropout=1.0)),
        ("at least as many keys", lambda: attention(dense, dense[:, :, :4], dense[:, :, :4], causal=True)),
        (r"\[B, N, 3, H, d\]", lambda: attention_qkv(dense)),
        (r"query must be \[5, H, d\]", lambda: attention_varlen((q[:4], q, q), text)),
        (r"key must be \[5, 2, 32\]", lambda: attention_varlen((q, q[:4], q[:4]), text)),
        ("as its layout says", lambda: attention_varlen((q, kv[:1], kv[:1]), layout)),
        ("as its layout says", lambda: attention_varlen((q, kv[:, :8], kv[:, :8]), layout)),
        (
            "its own keys",
            lambda: attention_varlen((q, kv, kv), Layout([3, 2], [9, 9], [0, 0], device="cpu"), causal=True),
        ),
        ("first is the place", lambda: attention_varlen((q, q, q), text, first=0)),
        (r"takes q, k, v, or", lambda: attention_varlen((q, kv), layout)),
        (r"takes q, k, v, or", lambda: attention_varlen((q, q, q, q), text)),
        (r"takes q, k, v, or", lambda: attention_varlen((kv.unsqueeze(2),), layout)),
        ("first is the place", lambda: attention_varlen((q, q, q), text, causal=True, first=-1)),
        ("key_mask must be bool", lambda: attention_varlen((q, kv, kv), layout, key_mask=torch.ones(2, 9))),
        (
            "make it for that device",
            lambda: attention_varlen((q, kv, kv), Layout([3, 2], [9, 9], device="meta")),
        ),
        (
            "got torch.int64; use mask.bool",
            lambda: attention(dense, dense, dense, torch.ones(1, 1, 1, 5).long()),
        ),
        (r"broadcastable to \[1, 2, 5, 5\]", lambda: attention(dense, dense, dense, torch.ones(3, 1, 1, 5))),
        ("mask is on meta", lambda: attention(dense, dense, dense, torch.ones(5, 5, device="meta"))),
        ("at least one number", lambda: attention(*[dense[..., :0]] * 3)),
        ("must be one of", lambda: attention(*[dense.long()] * 3)),
        ("query must have shape", lambda: attention(*[torch.tensor(1.0)] * 3)),
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


def test_the_kernel_says_which_head_sizes_it_has(triton):
    q = random(1, 2, 5, 48)
    with pytest.raises(ValueError, match="head sizes"):
        attention(q, q, q)
    with pytest.raises(ValueError, match="head sizes"):
        attention_qkv(random(1, 5, 3, 2, 48))
