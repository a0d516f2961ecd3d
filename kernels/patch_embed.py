"""Patch embedding: a convolution whose stride is its kernel size, as a matrix product that gathers its own rows.

    y[b, 0]     = cls + pos[0]
    y[b, 1 + i] = W patch(b, i) + bias + pos[1 + i]
    patch(b, i)[c, u, v] = image[b, c, P (i // G) + u, P (i % G) + v]

    dW = sum over b, i of dy[b, 1 + i] patch(b, i)^T         (the other gradients are sums of dy over the batch)

Shapes: image [B, C, H, W] float or uint8, weight [D, K] with K = C P P, bias and cls [D], pos [T, D], y and dy
[B, T, D]; G = W / P patches a row, N = G H / P patches, T = N + 1. Pixels of any dtype are cast to the weight's or
dy's, products are summed in fp32. FLOPs: 2 B N K D, forward and for dW alike. Bytes: the image and y once (4 B N K
of fp32 pixels, 2 B T D of bf16 y); the weight stays in L2. The class token is a patch of zeros: 1 row in T too many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase
from .table import buckets, lookup
from .tiles import aot_case, cdiv, halves


@triton.jit
def _pixel(k, height, width, P: tl.constexpr):
    """Offset of element k = (c, u, v) of a patch from the patch's first pixel."""
    return ((k // (P * P)) * height + (k // P) % P) * width + k % P


@triton.jit
def _patch(b, i, height, width, C: tl.constexpr, P: tl.constexpr):
    """Offset of the first pixel of patch i of the b-th image from here; a tile's images lie within 2^31 pixels."""
    grid = width // P
    return b * (C * height * width) + ((i // grid) * P) * width + (i % grid) * P


@triton.jit
def _embed_store(
    acc, bias_ptr, cls_ptr, pos_ptr, y_ptr, r, t, d0, rows, D, BM: tl.constexpr, BN: tl.constexpr
):
    """Rows r (tokens t; `rows` are left) and BN columns from d0 of y, from the products."""
    if BN > 64:
        left, right = halves(acc, BM, BN)
        _embed_store(left, bias_ptr, cls_ptr, pos_ptr, y_ptr, r, t, d0, rows, D, BM, BN // 2)
        _embed_store(right, bias_ptr, cls_ptr, pos_ptr, y_ptr, r, t, d0 + BN // 2, rows, D, BM, BN // 2)
    else:
        d = d0 + tl.arange(0, BN)
        inside = (r < rows)[:, None] & (d < D)[None, :]
        bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        cls = tl.load(cls_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        pos = tl.load(pos_ptr + t[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        y = acc + tl.where((t > 0)[:, None], bias[None, :], cls[None, :]) + pos
        tl.store(y_ptr + r[:, None] * D + d[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _patch_embed_fwd(
    image_ptr, w_ptr, bias_ptr, cls_ptr, pos_ptr, y_ptr, rows, height, width, D,
    C: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = C * P * P
    T = (height // P) * (width // P) + 1
    columns = tl.cdiv(D, BN)
    # The tiles of one row block are neighbours: they read the same pixels, from L2 but for the first.
    first = (tl.program_id(0) // columns) * BM
    d0 = (tl.program_id(0) % columns) * BN
    d = d0 + tl.arange(0, BN)
    r = first + tl.arange(0, BM)
    t = r % T
    image_ptr += (first // T).to(tl.int64) * (C * height * width)
    patch = _patch(r // T - first // T, t - 1, height, width, C, P)
    has_patch = (r < rows) & (t > 0)

    acc = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, K, BK):
        k = start + tl.arange(0, BK)
        pixels = tl.load(
            image_ptr + patch[:, None] + _pixel(k, height, width, P)[None, :],
            mask=has_patch[:, None] & (k < K)[None, :],
            other=0,
        )
        w = tl.load(w_ptr + d[None, :] * K + k[:, None], mask=(d < D)[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(pixels.to(w.dtype), w, acc, input_precision=PRECISION)
    y_ptr += first.to(tl.int64) * D
    _embed_store(acc, bias_ptr, cls_ptr, pos_ptr, y_ptr, r - first, t, d0, rows - first, D, BM, BN)


@triton.jit(do_not_specialize=["patches"])
def _patch_embed_dw(
    dy_ptr, image_ptr, dw_ptr, patches, share, height, width, D,
    C: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of dW over one share of the patches; dw_ptr: [shares, D, K] fp32, added up by the caller."""
    K: tl.constexpr = C * P * P
    N = (height // P) * (width // P)
    columns: tl.constexpr = (K + BN - 1) // BN
    d = (tl.program_id(0) // columns) * BM + tl.arange(0, BM)
    k = (tl.program_id(0) % columns) * BN + tl.arange(0, BN)
    inside_d, inside_k = d < D, k < K
    pixel = _pixel(k, height, width, P)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, patches)

    acc = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(first, last, BK):
        m = start + tl.arange(0, BK)
        inside_m = m < last
        b0 = start // N
        b = m // N - b0
        dy = tl.load(  # every image has one row more in dy, and that comes first
            dy_ptr + (start + b0 + 1).to(tl.int64) * D + (m - start + b)[:, None] * D + d[None, :],
            mask=inside_m[:, None] & inside_d[None, :],
            other=0.0,
        )
        image = image_ptr + b0.to(tl.int64) * (C * height * width)
        pixels = tl.load(
            image + _patch(b, m % N, height, width, C, P)[:, None] + pixel[None, :],
            mask=inside_m[:, None] & inside_k[None, :],
            other=0,
        )
        acc = tl.dot(tl.trans(dy), pixels.to(dy.dtype), acc, input_precision=PRECISION)

    out = (tl.program_id(1).to(tl.int64) * D + d[:, None]) * K + k[None, :]
    tl.store(dw_ptr + out, acc, mask=inside_d[:, None] & inside_k[None, :])


def patch_embed_fwd(
    image: Tensor,
    weight: Tensor,
    bias: Tensor,
    cls: Tensor,
    pos: Tensor,
    out: torch.dtype,
    precision: str,
    config: dict,
) -> Tensor:
    """y [B, T, D] of dtype `out`. All contiguous, weight [D, C, P, P], pos [T, D].

    config: BM, BN, BK, num_warps, num_stages.
    """
    B, C, height, width = image.shape
    D, P = weight.shape[0], weight.shape[-1]
    y = torch.empty(B, pos.shape[0], D, dtype=out, device=image.device)
    if y.numel():
        rows = B * pos.shape[0]
        grid = (cdiv(rows, config["BM"]) * cdiv(D, config["BN"]),)
        _patch_embed_fwd[grid](
            image, weight, bias, cls, pos, y, rows, height, width, D, C, P, precision, **config,
        )  # fmt: skip
    return y


def patch_embed_dw(
    dy: Tensor,
    image: Tensor,
    patch_size: int,
    precision: str,
    programs: int,
    config: dict,
) -> Tensor:
    """dW [D, C, P, P] fp32. dy [B, T, D] and image contiguous; `programs`: how many keep the GPU busy."""
    B, C, height, width = image.shape
    D, K = dy.shape[2], C * patch_size**2
    patches = B * (dy.shape[1] - 1)
    tiles = cdiv(D, config["BM"]) * cdiv(K, config["BN"])
    # As many shares as fill one wave; each a whole number of steps, and at least eight of them.
    shares = max(1, min(programs // tiles, patches // (8 * config["BK"])))
    share = cdiv(cdiv(patches, shares), config["BK"]) * config["BK"]
    dw = torch.empty(shares, D, C, patch_size, patch_size, dtype=torch.float32, device=dy.device)
    _patch_embed_dw[(tiles, shares)](
        dy, image, dw, patches, share, height, width, D, C, patch_size, precision, **config,
    )  # fmt: skip
    return dw.sum(0) if shares > 1 else dw[0]


def aot_cases(arch: int) -> list[AotCase]:
    """Half-precision weights with pixels as they come, half or fp32 results; and fp32."""
    sizes = {"height": "i32:16", "width": "i32:16", "D": "i32:16"}
    found = []
    for dtype, pixels, states in [
        ("bf16", "bf16", "bf16"), ("bf16", "fp32", "bf16"), ("bf16", "fp32", "fp32"), ("bf16", "u8", "bf16"),
        ("fp16", "fp16", "fp16"), ("fp16", "u8", "fp16"), ("fp32", "fp32", "fp32"),
    ]:  # fmt: skip
        cores = dtype != "fp32"
        forward, backward = (
            lookup("patch_embed", arch, *buckets(kind, not cores)) for kind in ("forward", "backward")
        )
        parameters = {
            "w_ptr": f"*{dtype}",
            "bias_ptr": f"*{states}",
            "cls_ptr": f"*{states}",
            "pos_ptr": f"*{states}",
        }
        found += [
            aot_case(
                f"forward {dtype}, pixels {pixels}, out {states}", _patch_embed_fwd,
                {"image_ptr": f"*{pixels}", **parameters, "y_ptr": f"*{states}", "rows": "i32", **sizes},
                {"C": 3, "P": 16, "PRECISION": "ieee"}, forward, cores,
            ),
            aot_case(
                f"dW {dtype}, pixels {pixels}", _patch_embed_dw,
                {"dy_ptr": f"*{dtype}", "image_ptr": f"*{pixels}", "dw_ptr": "*fp32",
                 "patches": "i32", "share": "i32:16", **sizes},
                {"C": 3, "P": 16, "PRECISION": "ieee"}, backward, cores,
            ),
        ]  # fmt: skip
    return found
