"""The MLP against two linear layers in fp64: both backends, gradients, odd sizes, memory, bad inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from blipfast import backends
from blipfast.ops.mlp import mlp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "weight1", "bias1", "weight2", "bias2")

# leading shape, D, F: one row; remainders in rows, columns and the summed dimension; several groups of row tiles
SHAPES = [((1,), 16, 32), ((2, 7), 33, 47), ((5, 17), 16, 40), ((3, 1, 4), 40, 130)]


def inputs(lead, D, hidden, dtype=torch.float32, device=DEVICE):
    torch.manual_seed(0)
    shapes = [(*lead, D), (hidden, D), (hidden,), (D, hidden), (D,)]
    tensors = [torch.randn(shape, device=device) for shape in shapes]
    tensors[1] *= D**-0.5
    tensors[3] *= hidden**-0.5
    return [x.to(dtype).requires_grad_() for x in tensors]


def two_linear_layers(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def in_fp64(tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def run(function, tensors):
    """Output, and gradients of all inputs."""
    out = function(*tensors)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def worst(got, want):
    """The largest error relative to the largest value, over output and gradients."""
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in zip(got, want)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_two_linear_layers(shape, backend, poison_empty):
    tensors = inputs(*shape)
    got = run(mlp, tensors)
    assert got[0].shape == tensors[0].shape
    assert worst(got, run(two_linear_layers, in_fp64(tensors))) < 2e-6


def test_half_precision_is_as_exact_as_two_linear_layers_in_half(backend, poison_empty):
    tensors = inputs((3, 11), 48, 96, torch.float16)
    want = run(two_linear_layers, in_fp64(tensors))
    got = run(mlp, tensors)
    assert all(x.dtype == torch.float16 for x in got)
    assert worst(got, want) <= 2 * worst(run(two_linear_layers, tensors), want)


def test_gelu_is_exact_far_from_zero(backend):
    x = torch.linspace(-12, 12, 97, device=DEVICE)[:, None].requires_grad_()
    one, zero = torch.ones(1, 1, device=DEVICE), torch.zeros(1, device=DEVICE)
    y = mlp(x, one, zero, one, zero)
    (slope,) = torch.autograd.grad(y.sum(), x)
    reference = x.detach().double().requires_grad_()
    want = F.gelu(reference)
    (want_slope,) = torch.autograd.grad(want.sum(), reference)
    torch.testing.assert_close(y.double(), want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(slope.double(), want_slope, atol=1e-6, rtol=1e-6)


def test_without_gradients_the_result_is_the_same(backend, poison_empty):
    tensors = inputs((5, 7), 16, 40)
    with torch.no_grad():
        got = mlp(*tensors)
    assert torch.equal(got, mlp(*tensors))


@pytest.mark.parametrize("frozen", range(5))
def test_a_frozen_input_gets_no_gradient_and_changes_no_other(frozen, backend):
    tensors = inputs((9,), 16, 40)
    want = run(mlp, tensors)
    tensors[frozen].requires_grad_(False)
    learned = [x for x in tensors if x.requires_grad]
    out = mlp(*tensors)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    got = torch.autograd.grad(out, learned, grad)
    assert worst(got, want[1 : 1 + frozen] + want[2 + frozen :]) < 1e-6


def test_strided_inputs_and_an_expanded_gradient_are_right(backend):
    x, weight1, bias1, weight2, bias2 = inputs((4, 6), 16, 40)
    tensors = [x.transpose(0, 1), weight1.T.contiguous().T, bias1, weight2.T.contiguous().T, bias2]
    tensors = [t.detach().requires_grad_() for t in tensors]
    want = run(lambda *t: two_linear_layers(*t).sum(0), in_fp64(tensors))
    assert worst(run(lambda *t: mlp(*t).sum(0), tensors), want) < 2e-6


def test_an_empty_batch_gives_no_rows_and_zero_gradients(backend):
    out, grad_x, *grads = run(mlp, inputs((0, 5), 16, 40))
    assert out.shape == grad_x.shape == (0, 5, 16)
    assert not any(grad.any() for grad in grads)


def test_autocast_sets_the_dtype_and_gradients_come_back_in_fp32(backend):
    dtype = torch.float16 if DEVICE == "cpu" and backend == "triton" else torch.bfloat16
    tensors = inputs((3, 5), 16, 40)
    want = run(two_linear_layers, in_fp64(tensors))
    with torch.autocast(DEVICE, dtype):
        got = run(mlp, tensors)
    assert got[0].dtype == dtype and all(x.dtype == torch.float32 for x in got[1:])
    assert 1e-5 < worst(got, want) < 3e-2


def test_the_kernels_keep_one_hidden_state_for_backward():
    tensors = inputs((6,), 16, 40)
    kept = []
    with (
        backends.use("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
    ):
        mlp(*tensors)
    assert sum(x.shape == (6, 40) for x in kept) == 1


def test_compiled_without_graph_breaks_and_checkpointed_it_is_the_same(backend):
    tensors = inputs((3, 5), 16, 40)
    want = run(mlp, tensors)
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    assert worst(run(compiled, tensors), want) < 1e-6
    recomputed = run(lambda *x: checkpoint(mlp, *x, use_reentrant=False), tensors)
    assert worst(recomputed, want) == 0


@pytest.mark.parametrize("keep", [True, False])
def test_operators_pass_pytorchs_own_check(keep):
    x, weight1, bias1, weight2, _ = (t.detach() for t in inputs((9,), 16, 40))
    torch.library.opcheck(torch.ops.blipfast.linear_gelu.default, (x, weight1, bias1, keep))
    h = torch.randn(9, 40, device=DEVICE)
    torch.library.opcheck(torch.ops.blipfast.linear_dgelu.default, (x, weight2, h))


def test_a_second_derivative_is_refused_by_the_kernels():
    tensors = inputs((3,), 16, 40)
    with backends.use("triton"):
        (first,) = torch.autograd.grad(mlp(*tensors).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 15)}, "weight1 must have shape"),
        ({"x": torch.zeros(())}, "x must have shape"),
        ({"weight1": torch.zeros(40)}, "weight1 must have shape"),
        ({"bias1": torch.zeros(16)}, "bias1 must have shape"),
        ({"weight2": torch.zeros(40, 16)}, "weight2 must have shape"),
        ({"bias2": torch.zeros(40)}, "bias2 must have shape"),
        ({"x": torch.zeros(3, 16, dtype=torch.float16)}, "weight1 is torch.float32, x is torch.float16"),
        ({"x": torch.zeros(3, 16, dtype=torch.int64)}, "x must be one of"),
        ({"bias2": torch.zeros(16, device="meta")}, "bias2 is on meta"),
    ],
)
def test_wrong_inputs_are_refused_by_name(change, message, backend):
    tensors = dict(zip(NAMES, inputs((3,), 16, 40))) | {
        name: x if x.is_meta else x.to(DEVICE) for name, x in change.items()
    }
    with pytest.raises(ValueError, match=message):
        mlp(**tensors)


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [((8, 197), 768, 3072), ((3, 577), 1024, 4096), ((1001,), 768, 3072), ((7,), 96, 384)]
)
def test_error_is_at_most_twice_pytorchs(shape, dtype, poison_empty):
    tensors = inputs(*shape, dtype)
    want = run(two_linear_layers, in_fp64(tensors))
    plain = run(two_linear_layers, tensors)
    with backends.use(mlp="triton"):
        got = run(mlp, tensors)
    for name, ours, theirs, exact in zip(("output", *NAMES), got, plain, want):
        assert worst([ours], [exact]) <= 2 * worst([theirs], [exact]) + 1e-6, name


@pytest.mark.gpu
def test_fifty_runs_are_identical():
    tensors = inputs((32, 197), 768, 3072, torch.bfloat16)
    with backends.use(mlp="triton"):
        first = run(mlp, tensors)
        for _ in range(50):
            assert all(torch.equal(a, b) for a, b in zip(run(mlp, tensors), first))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements_are_right():
    x, *weights = (t.detach() for t in inputs((64,), 768, 3072, torch.bfloat16))
    rows = x.repeat(2**31 // (3072 * 64) + 2, 1)  # elements of the hidden state pass 2^31
    with backends.use(mlp="triton"):
        out = mlp(rows, *weights)
        one = mlp(x, *weights)
    for part in (out[-64:], out[64 * 5000 : 64 * 5001]):  # products of other sizes add up in another order
        torch.testing.assert_close(part, one, rtol=0.02, atol=0.02)
