"""What is made of a hidden state in backward: against fp64, odd shapes, poisoned memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.ops.gelu_gradient import gelu_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE, dtype)


def exactly(da: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = h.double().requires_grad_()
    a = F.gelu(h)
    (dh,) = torch.autograd.grad(a, h, da.double())
    return dh, a.detach(), dh.sum(0)


def near(got: Tensor, want: Tensor, bound: float) -> bool:
    return bool((got.double() - want).abs().max() <= bound * want.abs().max())


# one row; remainders in rows and columns; several shares
@pytest.mark.parametrize("shape", [(1, 8), (7, 33), (90, 40), (1100, 5)])
def test_the_gradient_of_gelu_its_output_and_the_sum_are_exact(shape, backend, poison_empty):
    h, da = 3 * random(*shape), random(*shape).flip(0)
    for got, want in zip(gelu_gradient(da, h), exactly(da, h), strict=True):
        assert near(got, want, 2e-6)
    half = gelu_gradient(da.half(), h.half())
    assert all(x.dtype == torch.float16 for x in half)
    for got, want in zip(half, exactly(da.half(), h.half()), strict=True):
        assert near(got, want, 2e-3)


def test_any_strides_will_do(backend):
    h, da = random(9, 6), random(6, 9).t()
    for got, want in zip(gelu_gradient(da, h.t().contiguous().t()), exactly(da, h), strict=True):
        assert near(got, want, 2e-6)


def test_more_shares_than_a_pass_takes_are_summed(triton, poison_empty):
    from blipfast.kernels.shares import add_shares

    parts, first, second = random(2, 600, 20).cpu(), torch.empty(20), torch.empty(20)
    add_shares(parts, first, second)
    for got, want in zip((first, second), parts.double().sum(1), strict=True):
        assert near(got, want, 1e-6)


def test_nothing_gives_nothing(backend):
    assert [x.shape for x in gelu_gradient(random(0, 3), random(0, 3))] == [(0, 3), (0, 3), (3,)]


def test_the_operator_passes_pytorchs_own_check(triton):
    torch.library.opcheck(torch.ops.blipfast.gelu_gradient.default, (random(9, 40), random(9, 40)))


@pytest.mark.parametrize(
    "da, h, message",
    [
        (torch.zeros(3), torch.zeros(3), "h must have shape"),
        (torch.zeros(2, 3), torch.zeros(3, 3), "da must have h's shape"),
        (torch.zeros(3, 3).half(), torch.zeros(3, 3), "da is torch.float16"),
        (torch.zeros(3, 3, dtype=torch.int32), torch.zeros(3, 3, dtype=torch.int32), "h must be one of"),
        (torch.zeros(3, 3, device="meta"), torch.zeros(3, 3), "da is on meta"),
    ],
)
def test_wrong_inputs_are_refused_by_name(da, h, message):
    with pytest.raises(ValueError, match=f"gelu_gradient: {message}"):
        gelu_gradient(da, h)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(14775, 768), (5001, 3072), (3000, 100)])
def test_on_a_gpu_errors_stay_within_twice_pytorchs_and_repeats_are_identical(shape, dtype, poison_empty):
    h, da = random(*shape, dtype=dtype), random(*shape, dtype=dtype).flip(0)
    first = gelu_gradient(da, h, "triton")
    for got, theirs, want in zip(first, gelu_gradient(da, h, "torch"), exactly(da, h), strict=True):
        error, allowed = (got - want).abs().max(), 2 * (theirs - want).abs().max()
        assert error <= allowed + 1e-6 * want.abs().max()
    for _ in range(50):
        assert all(map(torch.equal, gelu_gradient(da, h, "triton"), first))
