"""Dropout + residual + LayerNorm: both backends against plain PyTorch in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from blipfast.ops.layer_norm import add_layer_norm, dropout_add_layer_norm

SHAPES = [(1, 16), (5, 33), (2, 3, 48), (19, 200), (3, 768)]


def inputs(*shape, dtype=torch.float32, weights=torch.float32, device="cpu", seed=0):
    random = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(shape, generator=random) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=random) for _ in range(2))
    made = [x.to(dtype), residual.to(dtype), weight.to(weights), bias.to(weights)]
    return [tensor.to(device).requires_grad_() for tensor in made]


def expected(x, residual, weight, bias, eps, mask=None):
    """In fp64: y, z."""
    x, residual, weight, bias = (tensor.double() for tensor in (x, residual, weight, bias))
    z = (x if mask is None else x * mask) + residual
    centred = z - z.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias, z


def gradients(outputs, tensors, seed=1):
    random = torch.Generator().manual_seed(seed)
    given = [torch.randn(out.shape, generator=random).to(out) for out in outputs]
    return torch.autograd.grad(outputs, tensors, given)


def assert_near(got, want, tolerance):
    """Largest error within `tolerance` of the largest value."""
    assert got.shape == want.shape
    if got.numel():
        error = (got.double() - want.double()).abs().max()
        assert error <= tolerance * want.double().abs().max().clamp_min(1e-3)  # NaN fails as well


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-12, 1e-6])
def test_value_and_gradients_are_those_of_fp64(shape, eps, backend, poison_empty):
    tensors = inputs(*shape)
    got, want = add_layer_norm(*tensors, eps=eps), expected(*tensors, eps)
    for a, b in zip(got, want):
        assert_near(a, b, 2e-6)
    for a, b in zip(gradients(got, tensors), gradients(want, tensors)):
        assert_near(a, b, 1e-5)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_post_norm_gives_the_same_without_the_sum(shape, backend, poison_empty):
    tensors = inputs(*shape)
    got, (want, _) = dropout_add_layer_norm(*tensors), expected(*tensors, 1e-12)
    assert_near(got, want, 2e-6)
    for a, b in zip(gradients([got], tensors), gradients([want], tensors)):
        assert_near(a, b, 1e-5)
    with torch.no_grad():
        assert torch.equal(dropout_add_layer_norm(*tensors), got)


def test_only_the_sum_may_be_used(backend, poison_empty):
    tensors = inputs(4, 24)
    _, z = add_layer_norm(*tensors)
    dx, dr = torch.autograd.grad(z.square().sum(), tensors[:2])
    assert_near(dx, 2 * z, 1e-6)
    assert_near(dr, 2 * z, 1e-6)


@pytest.mark.parametrize(
    "x_dtype, residual_dtype", [(torch.float16, torch.float16), (torch.float16, torch.float32)]
)
def test_half_precision_errs_no_more_than_plain_torch(x_dtype, residual_dtype, backend, poison_empty):
    x, residual, weight, bias = inputs(11, 96)
    x, residual = (t.detach().to(d).requires_grad_() for t, d in ((x, x_dtype), (residual, residual_dtype)))
    tensors = [x, residual, weight, bias]
    got = add_layer_norm(*tensors)
    assert [out.dtype for out in got] == [torch.promote_types(x_dtype, residual_dtype)] * 2
    want = expected(*tensors, 1e-6)
    z = x + residual
    plain = F.layer_norm(z.float(), (96,), weight, bias, 1e-6).to(z.dtype), z
    for a, b, c in zip(got, want, plain):
        assert (a - b).abs().max() <= 2 * (c - b).abs().max() + 1e-6
    found = gradients(got, tensors)
    for a, b, c, tensor in zip(found, gradients(want, tensors), gradients(plain, tensors), tensors):
        assert a.dtype == tensor.dtype
        assert (a - b).abs().max() <= 2 * (c - b).abs().max() + 1e-5


def test_backward_drops_what_forward_dropped(backend, poison_empty):
    tensors = inputs(7, 100)
    torch.manual_seed(3)
    ones = torch.ones(7, 100)
    _, mask = add_layer_norm(ones, torch.zeros(7, 100), *tensors[2:], dropout=0.3)
    assert sorted(mask.unique().tolist()) == pytest.approx([0.0, 1 / 0.7], rel=1e-5)
    torch.manual_seed(3)
    got, want = add_layer_norm(*tensors, dropout=0.3), expected(*tensors, 1e-6, mask.detach())
    for a, b in zip(got, want):
        assert_near(a, b, 2e-6)
    for a, b in zip(gradients(got, tensors), gradients(want, tensors)):
        assert_near(a, b, 1e-5)


def test_dropout_drops_as_often_as_asked_and_everywhere_alike(triton):
    torch.manual_seed(0)
    T, D, p = 64, 256, 0.25
    ones, zeros, weight = torch.ones(T, D), torch.zeros(T, D), torch.ones(D)
    dropped = (add_layer_norm(ones, zeros, weight, weight, dropout=p)[1] == 0).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean() - p) < 4 * deviation / (T * D) ** 0.5
    assert ((dropped.mean(0) - p).abs() < 5 * deviation / T**0.5).all()
    assert ((dropped.mean(1) - p).abs() < 5 * deviation / D**0.5).all()
    centred = (dropped - p) / deviation
    for near in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(near.mean()) < 4 / near.numel() ** 0.5
    windows = dropped.unfold(1, 64, 4).reshape(-1, 64)
    assert len(windows.unique(dim=0)) == len(windows)  # no random numbers are used twice
    again = (add_layer_norm(ones, zeros, weight, weight, dropout=p)[1] == 0).double()
    assert abs(((again - p) / deviation * centred).mean()) < 4 / (T * D) ** 0.5


def test_rows_longer_than_the_kernel_takes_say_so(triton):
    with pytest.raises(ValueError, match="at most 4096 columns"):
        add_layer_norm(*(torch.zeros(2, 5000) for _ in range(2)), torch.zeros(5000), torch.zeros(5000))


def test_no_rows_and_strided_rows_are_fine(backend):
    x, residual, weight, bias = inputs(0, 3, 40)
    y, z = add_layer_norm(x, residual, weight, bias)
    assert y.shape == z.shape == (0, 3, 40)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients([y, z], [weight, bias]))
    base = inputs(6, 80)
    strided = [base[0][::2, ::2], base[1].t()[:40, ::2].t(), base[2][::2], base[3][:40]]
    for a, b in zip(add_layer_norm(*strided), expected(*strided, 1e-6)):
        assert_near(a, b, 2e-6)


def test_expanded_gradients_are_read_right(backend):
    tensors = inputs(5, 24)
    got, want = add_layer_norm(*tensors), expected(*tensors, 1e-6)
    for a, b in zip(*(torch.autograd.grad(y.sum() + z.sum(), tensors) for y, z in (got, want))):
        assert_near(a, b, 1e-5)


def test_autocast_gives_what_the_next_linear_wants_and_keeps_the_stream(backend, poison_empty):
    x, residual, weight, bias = inputs(4, 32)
    with torch.autocast("cpu", dtype=torch.float16):
        y, z = add_layer_norm(x.half(), residual, weight, bias)
        post = dropout_add_layer_norm(x.half(), residual, weight, bias)
    assert (y.dtype, z.dtype, post.dtype) == (torch.float16, torch.float32, torch.float32)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_and_checkpointed_is_the_same(dropout, backend, poison_empty):
    tensors = inputs(6, 40)

    def run(*tensors):
        return add_layer_norm(*tensors, dropout=dropout)

    def seeded(f):
        torch.manual_seed(5)
        outputs = f(*tensors)
        return [*outputs, *gradients(outputs, tensors)]

    torch.compiler.reset()  # a compiled function keeps the backend it was traced with
    want = seeded(run)
    for f in (
        torch.compile(run, fullgraph=True, backend="aot_eager"),
        lambda *tensors: checkpoint(run, *tensors, use_reentrant=False),
    ):
        for a, b in zip(seeded(f), want):
            assert torch.equal(a, b)


def test_the_operators_pass_opcheck(triton):
    x, residual, weight, bias = (tensor.detach() for tensor in inputs(6, 40))
    seed, ops = torch.tensor([7]), torch.ops.blipfast
    half = torch.float16
    for store in (True, False):
        arguments = (x.half(), residual, weight, bias, seed, 0.1, 1e-6, half, store)
        torch.library.opcheck(ops.add_layer_norm_forward.default, arguments)
    for dz, chance, dtype in ((residual, 0.0, torch.float32), (None, 0.1, torch.float32), (None, 0.0, half)):
        arguments = (x, dz, residual, x[:, 0], weight[:6], weight, seed, chance, dtype, torch.float32)
        torch.library.opcheck(ops.add_layer_norm_backward.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(residual=torch.zeros(4, 31)), "residual must have x's shape"),
        (dict(weight=torch.zeros(31)), r"weight must have shape \[32\]"),
        (dict(bias=torch.zeros(1, 32)), r"bias must have shape \[32\]"),
        (dict(x=torch.zeros(4, 32, dtype=torch.int32)), "x must be one of"),
        (dict(x=torch.zeros(4, 32, dtype=torch.float64)), "x must be one of"),
        (dict(residual=torch.zeros(4, 32, device="meta")), "residual is on meta"),
        (dict(dropout=1.0), "dropout must be at least 0 and below 1"),
    ],
)
def test_wrong_inputs_are_refused(change, message, backend):
    given = dict(
        x=torch.zeros(4, 32), residual=torch.zeros(4, 32), weight=torch.ones(32), bias=torch.ones(32)
    )
    with pytest.raises(ValueError, match=f"layer_norm: .*{message}"):
        add_layer_norm(**{**given, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(257, 768), (1000, 1024), (3, 100)])
def test_gpu_half_precision_errs_at_most_twice_plain_torch(dtype, shape, triton):
    tensors = inputs(*shape, dtype=dtype, weights=dtype, device="cuda")
    got, want = add_layer_norm(*tensors), expected(*tensors, 1e-6)
    z = tensors[0] + tensors[1]
    plain = F.layer_norm(z, shape[-1:], *tensors[2:], 1e-6), z
    found = [*got, *gradients(got, tensors)]
    for a, b, c in zip(
        found, [*want, *gradients(want, tensors)], [*plain, *gradients(plain, tensors)], strict=True
    ):
        assert (a - b).abs().max() <= 2 * (c - b).abs().max() + 1e-6


@pytest.mark.gpu
def test_gpu_repeats_are_identical(triton):
    tensors = inputs(3000, 768, dtype=torch.bfloat16, device="cuda")

    def run():
        torch.manual_seed(1)
        outputs = add_layer_norm(*tensors, dropout=0.1)
        return [*outputs, *gradients(outputs, tensors)]

    first = run()
    for _ in range(50):
        assert all(map(torch.equal, run(), first))


@pytest.mark.gpu
def test_gpu_launches_where_the_tensors_are(triton):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = inputs(5, 64, device="cuda:1")
    got, want = add_layer_norm(*tensors), expected(*tensors, 1e-6)
    for a, b in zip([*got, *gradients(got, tensors)], [*want, *gradients(want, tensors)]):
        assert_near(a, b, 1e-5)


@pytest.mark.gpu
def test_gpu_more_than_two_to_the_31_elements(triton):
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    T, D = 2**20 + 3, 2048
    x = torch.zeros(T, D, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(D)
    weight, bias = torch.ones(D, device="cuda"), torch.zeros(D, device="cuda")
    with torch.no_grad():
        y, z = add_layer_norm(x, x, weight, bias)
    assert torch.equal(z[-1], x[-1] * 2)
    assert_near(y[-1], F.layer_norm(z[-1].float(), (D,)), 1e-2)
