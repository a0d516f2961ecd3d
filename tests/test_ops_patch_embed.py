"""Patch embedding against a convolution in fp64: both backends, gradients, odd sizes, uint8 pixels, bad inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from blipfast import backends
from blipfast.data.transforms import MEAN, STD
from blipfast.ops.patch_embed import fold_normalisation, patch_embed, patch_embed_uint8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("images", "weight", "bias", "cls_token", "pos_embed")

# B, C, height, width, P, D: one patch an image; several row and column tiles with remainders; K no multiple of a tile
SHAPES = [(2, 3, 8, 8, 8, 16), (3, 3, 24, 32, 8, 40), (5, 1, 6, 10, 2, 17), (1, 3, 28, 14, 14, 24)]


def inputs(B, C, height, width, P, D, dtype=torch.float32, device=DEVICE):
    torch.manual_seed(0)
    T = (height // P) * (width // P) + 1
    shapes = [(B, C, height, width), (D, C, P, P), (D,), (1, 1, D), (1, T, D)]
    images, *parameters = (torch.randn(shape, device=device) for shape in shapes)
    parameters[0] = parameters[0] * (C * P * P) ** -0.5
    return [images.to(dtype), *(x.to(dtype).requires_grad_() for x in parameters)]


def convolution(images, weight, bias, cls_token, pos_embed):
    """What the model says: convolve, flatten, put the class token first, add positions."""
    x = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    return torch.cat([cls_token.expand(len(x), -1, -1), x], 1) + pos_embed


def in_fp64(tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def run(function, tensors, seed=1):
    """Output, and gradients of all but the images."""
    out = function(*tensors)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)
    return [out.detach(), *torch.autograd.grad(out, tensors[1:], grad)]


def worst(got, want):
    """The largest error relative to the largest value, over output and gradients."""
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in zip(got, want)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_a_convolution(shape, backend, poison_empty):
    tensors = inputs(*shape)
    assert worst(run(patch_embed, tensors), run(convolution, in_fp64(tensors))) < 2e-6


def test_half_precision_is_as_exact_as_the_convolution_in_half(backend, poison_empty):
    tensors = inputs(3, 3, 24, 32, 8, 40, torch.float16)
    want = run(convolution, in_fp64(tensors))
    got = run(patch_embed, tensors)
    assert got[0].dtype == torch.float16
    assert worst(got, want) <= 2 * worst(run(convolution, tensors), want)


def test_the_gradient_is_summed_over_shares_of_the_patches(backend, poison_empty):
    tensors = inputs(40, 1, 16, 16, 2, 16)  # 2,560 patches: enough for several programs a tile
    # fp32 sums of so many err by up to 2.3e-6 where a processor's BLAS adds them one by one
    assert worst(run(patch_embed, tensors), run(convolution, in_fp64(tensors))) < 4e-6


def test_uint8_pixels_give_what_normalised_ones_give(backend, poison_empty):
    _, weight, bias, cls, pos = inputs(2, 3, 24, 32, 8, 40)
    pixels = torch.randint(0, 256, (2, 3, 24, 32), dtype=torch.uint8, device=DEVICE)
    mean, std = (torch.tensor(x, dtype=torch.float64, device=DEVICE)[:, None, None] for x in (MEAN, STD))
    normalised = (pixels.double() / 255 - mean) / std
    parameters = (weight, bias, cls, pos)
    want = run(convolution, [normalised, *in_fp64(parameters)])

    def folded(pixels, weight, bias, cls, pos):
        return patch_embed_uint8(pixels, *fold_normalisation(weight, bias, MEAN, STD), cls, pos)

    assert worst(run(folded, [pixels, *parameters]), want) < 3e-6  # gradients too: folding is differentiable


def test_weights_folded_in_half_lose_no_more_than_normalised_pixels_in_half(backend):
    _, weight, bias, cls, pos = (x.detach() for x in inputs(2, 3, 24, 32, 8, 40))
    pixels = torch.randint(0, 256, (2, 3, 24, 32), dtype=torch.uint8, device=DEVICE)
    mean, std = (torch.tensor(x, dtype=torch.float64, device=DEVICE)[:, None, None] for x in (MEAN, STD))
    normalised = (pixels.double() / 255 - mean) / std
    want = convolution(normalised, *in_fp64((weight, bias, cls, pos)))
    half = convolution(normalised.half(), *(x.half() for x in (weight, bias, cls, pos)))
    folded = fold_normalisation(weight, bias, MEAN, STD, dtype=torch.float16)
    got = patch_embed_uint8(pixels, *folded, cls.half(), pos.half())
    assert got.dtype == torch.float16
    assert worst([got], [want]) <= 2 * worst([half], [want])


def test_pixels_of_another_dtype_are_cast_to_the_weights(backend):
    images, *parameters = inputs(2, 3, 16, 16, 8, 16, torch.float16)
    torch.testing.assert_close(patch_embed(images.float(), *parameters), patch_embed(images, *parameters))


def test_autocast_multiplies_in_half_and_keeps_fp32_states(backend):
    if DEVICE == "cpu" and backend == "triton":
        dtype = torch.float16  # the interpreter has no bfloat16
    else:
        dtype = torch.bfloat16
    tensors = inputs(2, 3, 16, 16, 8, 16)
    want = run(convolution, in_fp64(tensors))
    with torch.autocast(DEVICE, dtype):
        got = run(patch_embed, tensors)
    assert all(x.dtype == torch.float32 for x in got)
    assert 1e-5 < worst(got, want) < 2e-2


def test_strided_pictures_and_an_expanded_gradient_are_right(backend):
    tensors = inputs(2, 3, 16, 24, 8, 16)
    want = run(lambda *x: convolution(*x).sum(1), in_fp64(tensors))
    tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    assert worst(run(lambda *x: patch_embed(*x).sum(1), tensors), want) < 2e-6


def test_an_empty_batch_gives_no_rows_and_zero_gradients(backend):
    out, *grads = run(patch_embed, inputs(0, 3, 16, 16, 8, 16))
    assert out.shape == (0, 5, 16)
    assert not any(grad.any() for grad in grads)


def test_pictures_that_want_gradients_get_them(backend):
    tensors = inputs(2, 3, 16, 16, 8, 16)
    tensors[0].requires_grad_()
    reference = in_fp64(tensors)
    grad = torch.randn(2, 5, 16, device=DEVICE)
    (got,) = torch.autograd.grad(patch_embed(*tensors), tensors[0], grad)
    (want,) = torch.autograd.grad(convolution(*reference), reference[0], grad.double())
    assert worst([got], [want]) < 2e-6


def test_frozen_weights_cost_no_gradient(backend):
    images, weight, bias, cls, pos = inputs(2, 3, 16, 16, 8, 16)
    out = patch_embed(images, weight.detach(), bias.detach(), cls.detach(), pos)
    out.sum().backward()
    torch.testing.assert_close(pos.grad, torch.full_like(pos, 2.0))
    assert weight.grad is None


def test_compiled_without_graph_breaks_and_checkpointed_it_is_the_same(backend):
    tensors = inputs(2, 3, 16, 16, 8, 16)
    want = run(patch_embed, tensors)
    compiled = torch.compile(patch_embed, backend="aot_eager", fullgraph=True)
    assert worst(run(compiled, tensors), want) < 1e-6
    recomputed = run(lambda *x: checkpoint(patch_embed, *x, use_reentrant=False), tensors)
    assert worst(recomputed, want) == 0


def test_operators_pass_pytorchs_own_check():
    images, weight, bias, cls, pos = inputs(2, 3, 16, 24, 8, 16)
    arguments = (
        images,
        weight,
        bias,
        cls.flatten().detach().requires_grad_(),
        pos[0].detach().requires_grad_(),
    )
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.blipfast.patch_embed_fwd.default, (*arguments, torch.float32), test_utils=tests
    )
    dy = torch.randn(2, 7, 16, device=DEVICE)
    torch.library.opcheck(torch.ops.blipfast.patch_embed_dw.default, (dy, images, 8))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": torch.zeros(2, 3, 17, 16)}, "17 x 16 do not divide into patches of 8 x 8"),
        ({"images": torch.zeros(2, 3, 0, 16)}, "do not divide"),
        ({"images": torch.zeros(3, 16, 16)}, "images must have shape"),
        ({"images": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)}, "images must be one of"),
        ({"weight": torch.zeros(16, 4, 8, 8)}, "weight must have shape"),
        ({"weight": torch.zeros(16, 3, 4, 8)}, "patches of 4 x 8"),
        ({"weight": torch.zeros(16, 3, 8, 8, dtype=torch.int64)}, "weight must be one of"),
        ({"bias": torch.zeros(15)}, "bias must have shape"),
        ({"cls_token": torch.zeros(1, 2, 16)}, "cls_token must have shape"),
        ({"pos_embed": torch.zeros(1, 6, 16)}, "pos_embed must have shape"),
        ({"pos_embed": torch.zeros(2, 5, 16)}, r"pos_embed must have shape \[1, 5, 16\]"),
        ({"bias": torch.zeros(16, device="meta")}, "bias is on meta"),
    ],
)
def test_wrong_inputs_are_refused_by_name(change, message, backend):
    tensors = dict(zip(NAMES, inputs(2, 3, 16, 16, 8, 16))) | {
        name: x if x.is_meta else x.to(DEVICE) for name, x in change.items()
    }
    with pytest.raises(ValueError, match=message):
        patch_embed(**tensors)


def test_float_pictures_are_refused_where_stored_pixels_are_meant():
    tensors = inputs(2, 3, 16, 16, 8, 16)
    with pytest.raises(ValueError, match="patch_embed_uint8: pixels must be one of"):
        patch_embed_uint8(*tensors)


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pixels", [torch.float32, None], ids=["fp32 pixels", "half pixels"])
@pytest.mark.parametrize(
    "shape", [(8, 3, 224, 224, 16, 768), (3, 3, 384, 384, 16, 1024), (5, 3, 48, 48, 8, 192)]
)
def test_error_is_at_most_twice_pytorchs(shape, pixels, dtype, poison_empty):
    tensors = inputs(*shape, dtype)
    want = run(convolution, in_fp64(tensors))
    plain = run(convolution, tensors)
    tensors[0] = tensors[0].to(pixels or dtype)
    with backends.use(patch_embed="triton"):
        got = run(patch_embed, tensors)
    for name, ours, theirs, exact in zip(("output", *NAMES[1:]), got, plain, want):
        assert worst([ours], [exact]) <= 2 * worst([theirs], [exact]) + 1e-6, name


@pytest.mark.gpu
def test_fifty_runs_are_identical():
    tensors = inputs(32, 3, 224, 224, 16, 768, torch.bfloat16)
    with backends.use(patch_embed="triton"):
        first = run(patch_embed, tensors)
        for _ in range(50):
            assert all(torch.equal(a, b) for a, b in zip(run(patch_embed, tensors), first))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements_are_right():
    images, weight, bias, cls, pos = (x.detach() for x in inputs(1, 3, 224, 224, 16, 768, torch.bfloat16))
    B = 2**31 // (197 * 768) + 8  # elements of y pass 2^31; so do those of the pictures
    pictures = images.expand(B, -1, -1, -1).contiguous()
    with backends.use(patch_embed="triton"):
        y = patch_embed(pictures, weight, bias, cls, pos)
        one = patch_embed(images, weight, bias, cls, pos)[0]
    assert torch.equal(y[-1], one) and torch.equal(y[B // 2], one)
