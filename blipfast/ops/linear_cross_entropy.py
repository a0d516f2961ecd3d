"""Cross-entropy of a linear layer's outputs, for a vocabulary so large that its logits should not all exist at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from .checks import check_dtype, check_rows, check_same_device, check_same_dtype, check_shape
from .launch import autocast_dtype, no_autocast, tuned
from .library import register

OP = "linear_cross_entropy"
REDUCTIONS = ("none", "sum", "mean")
FP16_SCALE = 1024.0
ROWS = {"cpu": 256, "cuda": 1024}  # whose logits exist at once, at most


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """F.cross_entropy(hidden weight^T + bias, labels) in fp32, with a bounded number of logits in memory.

    hidden [..., D], weight [V, D], one dtype (fp32, fp16, bf16), or whatever under autocast, which then sets that of
    the products; bias [V] or None. labels [...] int64: ignore_index where nothing is predicted (loss and gradient 0;
    better left out beforehand), else 0..V-1; others raise ValueError on a CPU, and on a GPU give NaN (triton) or end
    the program (torch). label_smoothing eps: the target is (1 - eps) the label + eps / V everything. token_weights
    [...]: factors of the losses.
    reduction: "none": weighted losses like labels; "sum"; "mean": the sum over the number of predicted tokens, weighted
    or not; NaN if there are none, as in PyTorch.

    Differentiable once in hidden, weight and bias; the weight gradient is summed in fp32. For "sum" and "mean" the
    gradients are made in the forward pass; for "none" backward computes the logits again, so that a loss weighted
    afterwards is right: prefer token_weights and "sum". Half-precision logits round as those of F.linear do.
    Raises ValueError for wrong shapes, dtypes, devices, label_smoothing or reduction. Served by: triton (CUDA), torch.
    """
    _check(hidden, weight, bias, labels, label_smoothing, token_weights, reduction)
    device = hidden.device.type
    dtype = autocast_dtype(hidden)
    if dtype is None:
        check_same_dtype(OP, hidden=hidden, weight=weight)
        dtype = hidden.dtype
    # `choose` looks at the dtype of the products, which autocast may have set
    backend = backends.choose(OP, hidden.new_empty(0, dtype=dtype)) if labels.numel() else "torch"
    flat = labels.reshape(-1).contiguous()
    if not labels.is_cuda and not torch.compiler.is_compiling():
        _check_labels(flat, ignore_index, len(weight))
    tensors = hidden.reshape(-1, hidden.shape[-1]).contiguous(), weight.contiguous(), bias, flat
    settings = float(label_smoothing), ignore_index, dtype, backend
    factors = None if token_weights is None else token_weights.reshape(-1).float().contiguous()
    wants_gradient = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    one_chunk = backend == "torch" and len(flat) <= _rows(device)
    if reduction != "none" and torch.is_grad_enabled() and wants_gradient and not one_chunk:
        total = _Sum.apply(*tensors, factors, settings)
    else:
        losses = _plain(*tensors, *settings[:3]) if one_chunk else _Losses.apply(*tensors, settings)
        losses = losses if factors is None else losses * factors
        if reduction == "none":
            return losses.view(labels.shape)
        total = losses.sum()
    return total if reduction == "sum" else total / (flat != ignore_index).sum()


def _check(hidden, weight, bias, labels, label_smoothing, token_weights, reduction) -> None:
    check_rows(OP, "hidden", hidden)
    check_shape(OP, "weight", weight, (None, hidden.shape[-1]))
    check_shape(OP, "labels", labels, tuple(hidden.shape[:-1]))
    if bias is not None:
        check_shape(OP, "bias", bias, (weight.shape[0],))
    if token_weights is not None:
        check_shape(OP, "token_weights", token_weights, tuple(labels.shape))
        if token_weights.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{OP}: no gradient flows to token_weights; pass token_weights.detach()")
    if not weight.shape[0]:
        raise ValueError(f"{OP}: weight must have at least one row, one for each word")
    check_dtype(OP, backends.FLOATS, hidden=hidden, weight=weight, bias=bias, token_weights=token_weights)
    check_dtype(OP, (torch.int64,), labels=labels)
    check_same_device(OP, hidden=hidden, weight=weight, bias=bias, labels=labels, token_weights=token_weights)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{OP}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OP}: reduction must be one of {list(REDUCTIONS)}, got {reduction!r}")


def _check_labels(labels: Tensor, ignore_index: int, V: int) -> None:
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= V))]
    if len(wrong):
        raise ValueError(f"{OP}: labels must be {ignore_index} or from 0 to {V - 1}, got {int(wrong[0])}")


def _plain(hidden, weight, bias, labels, smoothing, ignore_index, dtype) -> Tensor:
    """What fits into one chunk, as anybody would write it, but for the order: the losses [T], fp32.

    F.linear's weight gradient is a view, to which autograd cannot add that of the word embeddings in place.
    """
    logits = torch.mm(weight, hidden.t()).t()
    logits = (logits if bias is None else logits + bias.to(dtype)).float()
    return F.cross_entropy(
        logits, labels, reduction="none", label_smoothing=smoothing, ignore_index=ignore_index
    )


class _Sum(torch.autograd.Function):
    """Sum of weighted losses; its gradients are made with it, up to the factor that comes back."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, factors, settings):
        coefficients, unit = _in_range(factors, labels, settings)
        losses, *gradients = _op(hidden, weight, bias, labels, coefficients, *settings, True)
        ctx.save_for_backward(*gradients)
        ctx.unit, ctx.dtypes = unit, _dtypes(hidden, weight, bias)
        return losses.sum() if factors is None else (losses * factors).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        return *_scaled(ctx.saved_tensors, dloss * ctx.unit, ctx.dtypes), None, None, None


class _Losses(torch.autograd.Function):
    """The losses one by one; backward starts over, because every row's gradient has its own factor."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, settings):
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.settings = settings
        return _op(hidden, weight, bias, labels, None, *settings, False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses):
        *tensors, labels = ctx.saved_tensors
        coefficients, unit = _in_range(dlosses.contiguous(), labels, ctx.settings)
        gradients = _op(*tensors, labels, coefficients, *ctx.settings, True)[1:]
        return *_scaled(gradients, unit, _dtypes(*tensors)), None, None


def _in_range(
    factors: Tensor | None, labels: Tensor, settings: tuple
) -> tuple[Tensor | None, Tensor | float]:
    """The factors of the losses as coefficients times a unit.

    Gradients of logits are near 1 / V, where fp16 has few bits left: there the largest coefficient is FP16_SCALE.
    """
    if settings[2] != torch.float16 or not len(labels):
        return factors, 1.0
    if factors is None:
        factors = labels.new_ones(len(labels), dtype=torch.float32)
    unit = factors.abs().amax().clamp_min(torch.finfo(torch.float32).tiny) / FP16_SCALE
    return factors / unit, unit


def _dtypes(*tensors: Tensor | None) -> list[torch.dtype | None]:
    return [None if tensor is None else tensor.dtype for tensor in tensors]


def _scaled(gradients, factor: Tensor | float, dtypes) -> list[Tensor | None]:
    """Each gradient times the factor, in fp32, rounded to the dtype of its tensor; None for a tensor that is None."""
    dhidden, dweight, dbias = gradients
    scaled = []
    for gradient, dtype in zip((dhidden.float(), dweight, dbias), dtypes):
        room = None if dtype is None else torch.empty_like(gradient, dtype=dtype)
        scaled.append(None if dtype is None else torch.mul(gradient, factor, out=room))
    return scaled


# ------------------------------------------------------------------------------------------------- chunks of rows


def _forward(
    hidden, weight, bias, labels, coefficients, smoothing, ignore_index, dtype, backend, gradient
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [T] fp32 and the gradients of sum(coefficients * losses), a chunk of rows at a time.

    Those in hidden [T, D] are in `dtype`, those in weight [V, D] and bias [V] in fp32.
    """
    (T, D), V = hidden.shape, len(weight)
    losses = hidden.new_empty(T, dtype=torch.float32)
    dhidden = hidden.new_empty(T if gradient else 0, D, dtype=dtype)
    dbias = weight.new_zeros(V if gradient else 0, dtype=torch.float32)
    make = weight.new_empty if T else weight.new_zeros  # the first product fills it
    dweight = make(V if gradient else 0, D, dtype=torch.float32)
    rows = -(-T // max(1, -(-T // _rows(hidden.device.type))))  # all chunks of about one size
    rows += (
        -rows % 16 if rows > 16 else 0
    )  # and aligned: Triton compiles a kernel anew for pointers that are not
    columns, step = V, _torch_step
    if backend == "triton":
        columns, step = -(-V // 64) * 64, _triton_step  # the kernel and the products like aligned rows
        bias = None if bias is None else F.pad(bias, (0, columns - V))
    room = hidden.new_empty(rows, columns, dtype=dtype)[:, :V]
    with no_autocast(hidden):
        cast = weight.to(dtype)
        for start in range(0, T, rows):
            part = slice(start, min(start + rows, T))
            h, z = hidden[part].to(dtype), room[: min(rows, T - start)]
            c = None if coefficients is None else coefficients[part]
            dz = step(z, h, cast, bias, labels[part], c, losses[part], smoothing, ignore_index, gradient)
            if gradient:
                torch.mm(dz, cast, out=dhidden[part])
                dbias += dz.sum(0, dtype=torch.float32)
                _add_product(dweight, dz.t(), h, first=start == 0)
    return losses, dhidden, dweight, dbias


def _rows(device: str) -> int:
    return ROWS.get(device, ROWS["cuda"])


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a b, or total + a b if not first; total is fp32, and so is the sum within the product."""
    beta = 0 if first else 1
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # torch >= 2.8
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)
    else:
        product = a @ b
        total.copy_(product if first else total + product)


def _torch_step(z, h, weight, bias, labels, c, losses, smoothing, ignore_index, gradient) -> Tensor | None:
    """Fills the losses of a chunk, and gives the gradients of its logits [C, V]; z is room for the logits."""
    if bias is None:
        torch.mm(h, weight.t(), out=z)
    else:
        torch.addmm(bias.to(z.dtype), h, weight.t(), out=z)
    counts = labels != ignore_index
    label = labels.where(counts, 0)[:, None]
    log_p = torch.log_softmax(z, 1, dtype=torch.float32)
    loss = (smoothing - 1) * log_p.gather(1, label)[:, 0]
    if smoothing:
        loss -= smoothing * log_p.mean(1)
    losses.copy_(loss.where(counts, 0))
    if not gradient:
        return None
    dz = log_p.exp_()
    if smoothing:
        dz -= smoothing / z.shape[1]
    dz.scatter_add_(1, label, torch.full_like(loss, smoothing - 1)[:, None])
    dz.masked_fill_(~counts[:, None], 0)
    return (dz if c is None else dz.mul_(c[:, None])).to(z.dtype)


def _triton_step(z, h, weight, bias, labels, c, losses, smoothing, ignore_index, gradient) -> Tensor:
    """As `_torch_step`; the gradients take the place of the logits."""
    from ..kernels.linear_cross_entropy import cross_entropy_

    torch.mm(h, weight.t(), out=z)
    config = tuned(OP, "softmax", z, _INTERPRETED)
    cross_entropy_(z, bias, labels, c, losses, smoothing, ignore_index, gradient, config)
    return z


_INTERPRETED = {"BLOCK": 32, "num_warps": 4, "num_stages": 1}


def _fake(hidden, weight, bias, labels, coefficients, smoothing, ignore_index, dtype, backend, gradient):
    (T, D), V = hidden.shape, weight.shape[0]
    return (
        hidden.new_empty(T, dtype=torch.float32),
        hidden.new_empty(T if gradient else 0, D, dtype=dtype),
        weight.new_empty(V if gradient else 0, D, dtype=torch.float32),
        weight.new_empty(V if gradient else 0, dtype=torch.float32),
    )


_op = register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? coefficients, "
    "float smoothing, int ignore_index, ScalarType dtype, str backend, bool gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)
backends.register(
    OP, triton=backends.triton_serves(OP, backends.HALVES, bucket="softmax"), torch=backends.always
)
