"""Sums of rows, and what is made of a hidden state in backward: against fp64, odd shapes, poisoned memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast import backends
from blipfast.ops import linear as linear_op
from blipfast.ops.column_sum import column_sum
from blipfast.ops.gelu_gradient import gelu_gradient
from blipfast.ops.linear import linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# one row; remainders in rows and columns; several shares; more shares than one pass of their sum takes
SHAPES = [(1, 8), (7, 33), (90, 40), (1100, 5)]


def random(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE, dtype)


def near(got: Tensor, want: Tensor, bound: float) -> bool:
    return bool((got.double() - want).abs().max() <= bound * want.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_columns_are_summed(shape, backend, poison_empty):
    x = random(*shape)
    assert near(column_sum(x), x.double().sum(0), 1e-6)
    half = column_sum(x.half())
    assert half.dtype == torch.float16 and near(half, x.half().double().sum(0), 1e-3)
    assert near(column_sum(x.t()), x.double().sum(1), 1e-6), "any strides"


def test_more_shares_than_a_pass_takes_are_summed(triton, poison_empty):
    from blipfast.kernels.column_sum import add_shares

    parts, first, second = random(2, 600, 20), torch.empty(20), torch.empty(20)
    add_shares(parts.cpu(), first, second)
    for got, want in zip((first, second), parts.cpu().double().sum(1)):
        assert near(got, want, 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_gelu_its_output_and_the_sum_are_exact(shape, backend, poison_empty):
    h, da = 3 * random(*shape), random(*shape).flip(0)
    exact = h.double().requires_grad_()
    a = F.gelu(exact)
    (dh,) = torch.autograd.grad(a, exact, da.double())
    for got, want in zip(gelu_gradient(da, h), (dh, a.detach(), dh.sum(0)), strict=True):
        assert near(got, want, 2e-6)


def test_nothing_gives_nothing(backend):
    assert column_sum(random(0, 3)).tolist() == [0.0] * 3
    assert [x.shape for x in gelu_gradient(random(0, 3), random(0, 3))] == [(0, 3), (0, 3), (3,)]


def test_operators_pass_pytorchs_own_check():
    x, y = random(9, 40), random(9, 40)
    torch.library.opcheck(torch.ops.blipfast.column_sum.default, (x,))
    torch.library.opcheck(torch.ops.blipfast.gelu_gradient.default, (x, y))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: column_sum(torch.zeros(3)), "column_sum: x must have shape"),
        (lambda: column_sum(torch.zeros(3, 3, dtype=torch.int32)), "column_sum: x must be one of"),
        (lambda: gelu_gradient(torch.zeros(2, 3), torch.zeros(3, 3)), "gelu_gradient: da must have h's shape"),
        (lambda: gelu_gradient(torch.zeros(3, 3).half(), torch.zeros(3, 3)), "gelu_gradient: da is torch.float16"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
def test_a_linear_layer_is_pytorchs_whoever_sums(frozen, backend, poison_empty):
    tensors = [random(5, 7, 16), random(24, 16), random(24)]
    wanted = [x.requires_grad_() for i, x in enumerate(tensors) if i != frozen]
    grad = random(5, 7, 24)
    got, want = linear(*tensors), F.linear(*tensors)
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got, wanted, grad), torch.autograd.grad(want, wanted, grad)):
        assert near(a, b.double(), 1e-6)


def test_a_linear_layer_computes_in_autocasts_dtype_and_gives_fp32_gradients(triton):
    dtype = torch.float16
    tensors = [
        random(5, 7, 16).requires_grad_(),
        random(24, 16).requires_grad_(),
        random(24).requires_grad_(),
    ]
    with torch.autocast(DEVICE, dtype):
        out = linear(*tensors)
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out.float().square().sum(), tensors)
    assert all(x.dtype == torch.float32 for x in gradients)


def test_a_linear_layer_without_bias_or_gradients_is_pytorchs(triton, monkeypatch):
    monkeypatch.setattr(linear_op, "_Linear", None)
    x, weight, bias = random(4, 16), random(24, 16).requires_grad_(), random(24).requires_grad_()
    assert torch.equal(linear(x, weight, None), F.linear(x, weight))
    with torch.no_grad():
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(14775, 768), (5001, 3072), (3000, 100)])
def test_on_a_gpu_errors_stay_within_twice_pytorchs_and_repeats_are_identical(shape, dtype, poison_empty):
    h, da = random(*shape, dtype=dtype), random(*shape, dtype=dtype).flip(0)
    exact = h.double().requires_grad_()
    a = F.gelu(exact)
    (dh,) = torch.autograd.grad(a, exact, da.double())
    wants = h.double().sum(0), dh, a.detach(), dh.sum(0)
    plain = column_sum(h, "torch"), *gelu_gradient(da, h, "torch")

    def run():
        return column_sum(h, "triton"), *gelu_gradient(da, h, "triton")

    first = run()
    for got, theirs, want in zip(first, plain, wants, strict=True):
        error, allowed = (got - want).abs().max(), 2 * (theirs - want).abs().max()
        assert error <= allowed + 1e-6 * want.abs().max()
    for _ in range(50):
        assert all(map(torch.equal, run(), first))


@pytest.mark.gpu
def test_on_a_gpu_many_rows_are_summed_by_the_kernel():
    assert backends.choose("column_sum", torch.empty(4096, 8, device="cuda")) == "triton"
    assert backends.choose("column_sum", torch.empty(64, 8, device="cuda")) == "torch"
