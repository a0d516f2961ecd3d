"""Attention of the newest tokens over a cache that they become part of: against softmax in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blipfast import backends
from blipfast.ops.cached_attention import cached_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(n: int, q: int, S: int, used: int, H: int, d: int, dtype=torch.float32) -> list[Tensor]:
    """qkv, cache, slots, mask. What the new tokens' slots held before is NaN."""
    g = torch.Generator().manual_seed(n + q + S)
    qkv = torch.randn(n, q, 3, H, d, generator=g)
    cache = torch.randn(n, S, 2, H, d, generator=g)
    slots = torch.stack([torch.randperm(used, generator=g)[:q] for _ in range(n)])
    mask = torch.rand(n, q, used, generator=g) > 0.5
    mask.scatter_(2, slots[..., None], True)  # each sees itself, and perhaps other new ones
    cache.scatter_(1, slots[..., None, None, None].expand_as(qkv[:, :, 1:]), torch.nan)
    return [x.to(DEVICE, dtype) if x.is_floating_point() else x.to(DEVICE) for x in (qkv, cache, slots, mask)]


def exactly(qkv: Tensor, cache: Tensor, slots: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    cache = cache.double().scatter(
        1, slots[..., None, None, None].expand_as(qkv[:, :, 1:]), qkv[:, :, 1:].double()
    )
    key, value = cache[:, : mask.shape[-1]].unbind(2)
    scores = torch.einsum("nqhd,nshd->nhqs", qkv[:, :, 0].double(), key) * qkv.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    return torch.einsum("nhqs,nshd->nqhd", weights, value), cache


SHAPES = [(1, 1, 1, 1, 2, 32), (3, 3, 40, 22, 2, 64), (2, 5, 20, 20, 3, 32), (2, 16, 33, 17, 1, 128)]


@pytest.mark.parametrize("n, q, S, used, H, d", SHAPES)
def test_it_is_softmax_over_the_slots_that_are_seen(n, q, S, used, H, d, backend, poison_empty):
    qkv, cache, slots, mask = inputs(n, q, S, used, H, d)
    want, after = exactly(qkv, cache, slots, mask)
    got = cached_attention(qkv, cache, slots, mask)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache.double(), after, rtol=0, atol=0)


@pytest.mark.parametrize("n, q, S, used, H, d", SHAPES)
def test_in_half_precision_errors_stay_within_twice_pytorchs(n, q, S, used, H, d, triton):
    qkv, cache, slots, mask = inputs(n, q, S, used, H, d, torch.float16)
    want, _ = exactly(qkv, cache, slots, mask)
    with backends.use("torch"):
        theirs = cached_attention(qkv, cache.clone(), slots, mask)
    got = cached_attention(qkv, cache, slots, mask)
    assert got.dtype == torch.float16
    assert (got - want).abs().max() <= 2 * (theirs - want).abs().max() + 1e-4


def test_part_of_a_cache_and_of_a_mask_will_do(backend):
    """As decoding hands them over: some of the images, and of the slots those that are in use."""
    qkv, cache, slots, mask = inputs(3, 2, 20, 12, 2, 32)
    whole, seen = torch.zeros(6, *cache.shape[1:], device=DEVICE), mask.new_zeros(3, 2, 30)
    whole[2:5], seen[..., :12] = cache, mask
    want, after = exactly(qkv, cache, slots, mask)
    got = cached_attention(
        qkv.transpose(0, 1).contiguous().transpose(0, 1), whole[2:5], slots, seen[..., :12]
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(whole[2:5].double(), after) and not whole[:2].any() and not whole[5:].any()


def test_new_tokens_beyond_the_mask_are_kept_and_not_seen(backend):
    qkv, cache, _, mask = inputs(2, 3, 20, 20, 2, 32)
    slots = torch.tensor([[8, 17, 18], [19, 2, 11]], device=DEVICE)
    cache.nan_to_num_()
    mask = mask[..., :12].contiguous()
    mask[..., 0] = True
    want, after = exactly(qkv, cache, slots, mask)
    got = cached_attention(qkv, cache, slots, mask)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(cache.double(), after)


def test_the_kernel_refuses_a_cache_that_it_cannot_write_to(triton):
    qkv, cache, slots, mask = inputs(2, 3, 20, 20, 2, 32)
    apart = cache.transpose(3, 4).contiguous().transpose(3, 4)
    with pytest.raises(ValueError, match="heads lie one behind the other"):
        cached_attention(qkv, apart, slots, mask)


def test_no_gradient_flows(backend):
    qkv, *rest = inputs(2, 3, 20, 20, 2, 32)
    assert not cached_attention(qkv.requires_grad_(), *rest).requires_grad


def test_more_tokens_and_other_heads_than_the_kernel_takes_go_to_pytorch():
    for q, d in ((17, 32), (3, 12)):
        qkv, cache, slots, mask = inputs(2, q, 30, 30, 2, d)
        want, _ = exactly(qkv, cache, slots, mask)
        got = cached_attention(qkv, cache.clone(), slots, mask)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_no_texts_are_no_work(backend):
    qkv, cache, slots, mask = (x[:0] for x in inputs(1, 3, 8, 8, 2, 32))
    assert cached_attention(qkv, cache, slots, mask).shape == (0, 3, 2, 32)


def test_the_operator_passes_pytorchs_own_check(triton):
    qkv, cache, slots, mask = inputs(2, 3, 20, 12, 2, 32)
    arguments = (qkv, cache, slots, mask, 0.2)
    torch.library.opcheck(torch.ops.blipfast.cached_attention.default, arguments)


@pytest.mark.parametrize(
    "place, wrong, message",
    [
        (0, torch.zeros(2, 3, 2, 2, 32), "qkv must have shape"),
        (1, torch.zeros(2, 20, 2, 2, 64), "cache must have shape"),
        (1, torch.zeros(2, 20, 2, 2, 32).half(), "cache is torch.float16"),
        (2, torch.zeros(2, 4, dtype=torch.long), "slots must have shape"),
        (2, torch.zeros(2, 3), "slots must be one of"),
        (3, torch.zeros(2, 3, 12), "mask must be one of"),
        (3, torch.ones(2, 3, 21, dtype=torch.bool), "mask speaks of 21 slots, cache has 20"),
        (3, torch.ones(2, 3, 12, dtype=torch.bool, device="meta"), "mask is on meta"),
    ],
)
def test_wrong_inputs_are_refused_by_name(place, wrong, message):
    given = [x.cpu() for x in inputs(2, 3, 20, 12, 2, 32)]
    given[place] = wrong
    with pytest.raises(ValueError, match=f"cached_attention: {message}"):
        cached_attention(*given)


def test_what_the_kernel_does_not_take_is_refused_when_it_is_asked_for(triton):
    for q, d in ((17, 32), (3, 12)):
        with pytest.raises(
            ValueError, match="cached_attention: the kernel takes 16 new tokens and head sizes"
        ):
            cached_attention(*inputs(2, q, 30, 30, 2, d))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "n, q, S, used", [(32, 3, 64, 52), (128, 1, 40, 40), (5, 10, 400, 391), (32, 4, 64, 4)]
)
def test_on_a_gpu_errors_stay_within_twice_pytorchs_and_repeats_are_identical(
    n, q, S, used, dtype, poison_empty
):
    qkv, cache, slots, mask = inputs(n, q, S, used, 12, 64, dtype)
    want, _ = exactly(qkv, cache, slots, mask)
    with backends.use("torch"):
        theirs = cached_attention(qkv, cache.clone(), slots, mask)
    with backends.use("triton"):
        first, *others = (cached_attention(qkv, cache.clone(), slots, mask) for _ in range(51))
    assert (first - want).abs().max() <= 2 * (theirs - want).abs().max() + 1e-6
    assert all(torch.equal(first, other) for other in others)
