"""Pictures to tokens: patch embedding, class token and position embeddings in one operation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..processor import cpu_is_amd
from .checks import check_dtype, check_same_device, check_shape
from .launch import autocast_dtype, input_precision, multiprocessors, tuned
from .library import register

FLOATS = backends.FLOATS


def patch_embed(images: Tensor, weight: Tensor, bias: Tensor, cls_token: Tensor, pos_embed: Tensor) -> Tensor:
    """The first hidden states of a ViT: [B, C, H, W] -> [B, 1 + N, D].

        out[b, 0] = cls_token + pos_embed[0]        out[b, 1 + i] = conv(images)[b, i] + bias + pos_embed[1 + i]

    images: float, normalised. weight [D, C, P, P], bias [D]: of the convolution with stride P, which divides H and W.
    cls_token: [1, 1, D] or [D]. pos_embed: [1, 1 + N, D] or [1 + N, D], N = (H / P) (W / P), row by row.
    Pixels are cast to the weight's dtype, or to autocast's; sums are fp32. The result has the dtype to which product
    and pos_embed promote: fp32 position embeddings give fp32 states under autocast, as `conv(x) + pos_embed` does.
    Differentiable once in every argument; for a gradient of the images the PyTorch path serves.
    Raises ValueError for other shapes and dtypes or several devices. Served by: triton (CUDA), torch.
    """
    check_dtype("patch_embed", FLOATS, images=images)
    return _patch_embed(images, weight, bias, cls_token, pos_embed)


def patch_embed_uint8(
    pixels: Tensor, weight: Tensor, bias: Tensor, cls_token: Tensor, pos_embed: Tensor
) -> Tensor:
    """`patch_embed` of pictures as they are stored, uint8 in 0..255: a quarter of the bytes, and no normalisation pass.

    weight, bias: from `fold_normalisation`, once a model; the rest as in `patch_embed`. Exact up to rounding.
    """
    check_dtype("patch_embed_uint8", (torch.uint8,), pixels=pixels)
    return _patch_embed(pixels, weight, bias, cls_token, pos_embed)


def fold_normalisation(
    weight: Tensor,
    bias: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights and fp32 bias that read pixels of 0..255 where the given ones read (pixel / 255 - mean) / std.

        W' = W / (255 std)        b' = b - sum over a patch of W' 255 mean

    `dtype` of the new weights (None: as they are). The bias is made of W' as rounded, so that what is lost is relative
    to the normalised pixel and not to the raw one. Differentiable.
    """
    check_shape("fold_normalisation", "weight", weight, (None, len(mean), None, None))
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=weight.device)[None, :, None, None]
        for values in (mean, std)
    )
    folded = (weight.float() / (255 * std)).to(dtype or weight.dtype)
    return folded, bias.float() - (folded.float() * (255 * mean)).sum((1, 2, 3))


def _patch_embed(images, weight, bias, cls_token, pos_embed):
    check_shape("patch_embed", "images", images, (None, None, None, None))
    check_shape("patch_embed", "weight", weight, (None, images.shape[1], None, weight.shape[-1]))
    (D, _, rows, P), (height, width) = weight.shape, images.shape[2:]
    if rows != P or not P or height % P or width % P or not min(height, width):
        raise ValueError(
            f"patch_embed: pictures of {height} x {width} do not divide into patches of {rows} x {P}; "
            "resize them to a multiple, with a square patch"
        )
    T = (height // P) * (width // P) + 1
    if pos_embed.ndim == 3:
        check_shape("patch_embed", "pos_embed", pos_embed, (1, T, D))
    cls, pos = cls_token.reshape(-1), pos_embed[0] if pos_embed.ndim == 3 else pos_embed
    check_shape("patch_embed", "bias", bias, (D,))
    check_shape("patch_embed", "cls_token", cls, (D,))
    check_shape("patch_embed", "pos_embed", pos, (T, D))
    check_dtype("patch_embed", FLOATS, weight=weight, bias=bias, cls_token=cls, pos_embed=pos)
    check_same_device("patch_embed", images=images, weight=weight, bias=bias, cls_token=cls, pos_embed=pos)

    if dtype := autocast_dtype(images):
        weight = weight.to(dtype)
    out = torch.promote_types(weight.dtype, pos.dtype)
    wants_pixels = images.requires_grad and torch.is_grad_enabled()
    if not wants_pixels and backends.choose("patch_embed", weight) == "triton":
        tensors = (x.contiguous() for x in (images, weight, bias, cls, pos))
        return _PatchEmbed.apply(*tensors, out)
    return _torch(images, weight, bias, cls, pos, out)


def _torch(images, weight, bias, cls, pos, out):
    """One product over all rows; the class token's is a patch of zeros, which is cheaper than to concatenate after.

    On an AMD torch gives fp32 products to MKL, which makes do with AVX2 there, and convolutions to oneDNN.
    """
    (B, C, height, width), P = images.shape, weight.shape[-1]
    if images.device.type == "cpu" and weight.dtype == torch.float32 and cpu_is_amd():
        x = (
            F.conv2d(images.to(weight.dtype), weight, bias.to(weight.dtype), stride=P)
            .flatten(2)
            .transpose(1, 2)
        )
        return (torch.cat([cls.to(x.dtype).expand(B, 1, -1), x], 1) + pos).to(out)
    grid = (height // P, width // P)
    patches = images.reshape(B, C, grid[0], P, grid[1], P).permute(0, 2, 4, 1, 3, 5)
    rows = weight.new_zeros(B, pos.shape[0], C * P * P)
    rows[:, 1:].view(B, *grid, C, P, P).copy_(patches)
    table = torch.cat([(cls + pos[0])[None], bias + pos[1:]])
    y = F.linear(rows, weight.flatten(1))
    return y.add_(table) if y.dtype == out else y + table


# --------------------------------------------------------------------------------------------------------- triton

backends.register(
    "patch_embed",
    triton=backends.triton_serves("patch_embed", backends.HALVES, "forward"),
    torch=backends.always,
)

# Interpreted on a CPU, tiles are small so that small pictures have several of them.
INTERPRETED = {"BM": 32, "BN": 16, "BK": 32, "num_warps": 4, "num_stages": 1}


def _forward(images, weight, bias, cls, pos, out):
    from ..kernels.patch_embed import patch_embed_fwd

    config = tuned("patch_embed", "forward", weight, INTERPRETED)
    return patch_embed_fwd(images, weight, bias, cls, pos, out, input_precision(), config)


def _forward_fake(images, weight, bias, cls, pos, out):
    return images.new_empty(images.shape[0], *pos.shape, dtype=out)


_patch_embed_fwd = register(
    "patch_embed_fwd(Tensor images, Tensor weight, Tensor bias, Tensor cls, Tensor pos, ScalarType out) -> Tensor",
    _forward,
    _forward_fake,
)


def _dw(dy, images, patch_size):
    from ..kernels.patch_embed import patch_embed_dw

    config, programs = (
        tuned("patch_embed", "backward", dy, INTERPRETED),
        2 * multiprocessors(images.device),
    )
    return patch_embed_dw(dy, images, patch_size, input_precision(), programs, config)


def _dw_fake(dy, images, patch_size):
    return dy.new_empty(dy.shape[2], images.shape[1], patch_size, patch_size, dtype=torch.float32)


_patch_embed_dw = register(
    "patch_embed_dw(Tensor dy, Tensor images, int patch_size) -> Tensor", _dw, _dw_fake
)


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, weight, bias, cls, pos, out):
        ctx.save_for_backward(images)
        ctx.patch_size = weight.shape[-1]
        ctx.dtypes = [x.dtype for x in (weight, bias, cls, pos)]
        return _patch_embed_fwd(images, weight, bias, cls, pos, out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (images,) = ctx.saved_tensors
        weight, bias, cls, pos = ctx.dtypes
        dw = db = dcls = dpos = None
        if ctx.needs_input_grad[1]:
            dw = _patch_embed_dw(dy.to(weight).contiguous(), images, ctx.patch_size).to(weight)
        if any(ctx.needs_input_grad[2:]):
            sums = dy.sum(0, dtype=torch.float32)
            db, dcls, dpos = sums[1:].sum(0).to(bias), sums[0].to(cls), sums.to(pos)
        return None, dw, db, dcls, dpos, None
