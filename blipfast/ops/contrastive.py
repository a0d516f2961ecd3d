"""Image-text contrastive loss of one direction, against the batch and a queue, with soft momentum targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..kernels import table
from .checks import check_dtype, check_same_device, check_shape
from .launch import autocast_dtype, input_precision, multiprocessors, no_autocast
from .library import register

OP = "contrastive"
KERNEL_WIDTH = 256  # the widest features that the kernels take
CHUNK = {
    "cpu": 2**19,
    "cuda": 2**24,
}  # elements of [features, keys] similarities held at a time by the PyTorch path


def contrastive_loss(
    query: Tensor,
    teacher: Tensor | None,
    keys: Tensor,
    queue: Tensor,
    temp: Tensor,
    alpha: float,
    *,
    own: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    queue_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ITC in one direction: the loss, a scalar, and the similarities of the batch [B, N], both fp32.

    Cross-entropy of softmax(query [keys; queue] / temp) against alpha softmax(teacher [keys; queue] / temp) +
    (1 - alpha) positives, averaged over the batch. Source: BLIP section 3.2, official forward.

    query, teacher: online and momentum features [B, E], normalised; teacher may be None if alpha is 0.
    keys: momentum features of the other side [N, E], this batch's or all ranks'. queue: older ones [E, Q].
    temp: one number, a tensor. All of them fp32, fp16 or bf16, each its own; computed in fp32, see below.
    Positives of row i, of which every one gets the same share: key own[i] (own [B] int64), and those keys and queue
    entries whose ids equal query_ids[i] (query_ids [B], key_ids [N], queue_ids [Q], int64; without queue_ids none of
    the queue is a positive). A row without any makes the loss NaN, as an empty batch does: it divides by zero.
    queue_length: how many entries of the queue count, the first ones, int64 of one element on the device; None: all.

    Differentiable once in query and temp; the similarities, queries and keys over temp, carry no gradient. Gradients
    are computed in the forward pass, so the queue may be overwritten right after. Memory: O(B E + B N), never B x Q.
    Served by: triton (CUDA, E <= 256), torch. The kernels multiply as TF32 does, and therefore serve where that is
    allowed: half-precision queries, under autocast, or by torch.set_float32_matmul_precision.
    Raises ValueError for wrong shapes, dtypes, devices, alpha, missing positives, or gradients wanted where none flow.
    """
    _check(query, teacher, keys, queue, temp, alpha)
    _check_positives(query, keys, queue, own, query_ids, key_ids, queue_ids, queue_length)
    wants_gradient = torch.is_grad_enabled() and (query.requires_grad or temp.requires_grad)
    fixed = (
        teacher if alpha > 0 else None,
        keys,
        queue.contiguous(),
        *(x if x is None else x.contiguous() for x in (own, query_ids, key_ids, queue_ids, queue_length)),
    )
    backend = backends.choose(OP, query) if len(query) else "torch"
    temp = temp.float().reshape(())
    if wants_gradient:
        return _Contrastive.apply(query, temp, fixed, float(alpha), backend)
    return _contrastive(query, *fixed[:3], temp, float(alpha), *fixed[3:], False, backend)[:2]


def _check(query, teacher, keys, queue, temp, alpha) -> None:
    check_shape(OP, "query", query, (None, None))
    B, E = query.shape
    check_shape(OP, "keys", keys, (None, E))
    check_shape(OP, "queue", queue, (E, None))
    if temp.numel() != 1:
        raise ValueError(f"{OP}: temp must be one number, got shape {list(temp.shape)}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"{OP}: alpha must be between 0 and 1, got {alpha}")
    if teacher is not None:
        check_shape(OP, "teacher", teacher, (B, E))
    elif alpha > 0:
        raise ValueError(f"{OP}: soft targets (alpha {alpha}) need teacher features; pass them or alpha=0")
    if not len(keys):
        raise ValueError(f"{OP}: there must be keys of the batch, got none")
    check_dtype(OP, backends.FLOATS, query=query, teacher=teacher, keys=keys, queue=queue, temp=temp)
    check_same_device(OP, query=query, teacher=teacher, keys=keys, queue=queue, temp=temp)
    for name, tensor in (("teacher", teacher), ("keys", keys), ("queue", queue)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{OP}: no gradient flows to {name}; pass {name}.detach()")


def _check_positives(query, keys, queue, own, query_ids, key_ids, queue_ids, queue_length) -> None:
    B, N, Q = len(query), len(keys), queue.shape[1]
    if own is None and key_ids is None:
        raise ValueError(f"{OP}: say which keys are positives, by own, or by query_ids and key_ids")
    if (key_ids is None) != (query_ids is None) or (queue_ids is not None and query_ids is None):
        raise ValueError(f"{OP}: query_ids and key_ids come together, and queue_ids only with them")
    for name, tensor, size in (
        ("own", own, B),
        ("query_ids", query_ids, B),
        ("key_ids", key_ids, N),
        ("queue_ids", queue_ids, Q),
    ):
        if tensor is not None:
            check_shape(OP, name, tensor, (size,))
    if queue_length is not None and queue_length.numel() != 1:
        raise ValueError(f"{OP}: queue_length must be one number, got shape {list(queue_length.shape)}")
    tensors = dict(
        own=own, query_ids=query_ids, key_ids=key_ids, queue_ids=queue_ids, queue_length=queue_length
    )
    check_dtype(OP, (torch.int64,), **tensors)
    check_same_device(OP, query=query, **tensors)


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, temp, fixed, alpha, backend):
        loss, sim, dquery, dtemp = _contrastive(query, *fixed[:3], temp, alpha, *fixed[3:], True, backend)
        ctx.save_for_backward(dquery, dtemp)
        ctx.dtype = query.dtype
        ctx.mark_non_differentiable(sim)
        return loss, sim

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _):
        dquery, dtemp = ctx.saved_tensors
        return (dloss * dquery).to(ctx.dtype), dloss * dtemp, None, None, None


def _forward(
    query, teacher, keys, queue, temp, alpha, own, query_ids, key_ids, queue_ids, queue_length, gradient, backend
):  # fmt: skip
    positives = own, query_ids, key_ids, queue_ids, queue_length
    with no_autocast(query):
        if backend == "torch":
            return _torch(query, teacher, keys, queue, temp, alpha, *positives, gradient)
        from ..kernels.contrastive import contrastive

        configs = {name: _config(name, query) for name in ("statistics", "small", "gradient")}
        programs = multiprocessors(query.device)
        return contrastive(query, teacher, keys, queue, temp, alpha, *positives, gradient, programs, configs)


def _forward_fake(
    query, teacher, keys, queue, temp, alpha, own, query_ids, key_ids, queue_ids, queue_length, gradient, backend
):  # fmt: skip
    scalar = query.new_empty((), dtype=torch.float32)
    sim = query.new_empty(len(query), len(keys), dtype=torch.float32)
    dquery = query.new_empty(len(query) if gradient else 0, query.shape[1], dtype=torch.float32)
    return scalar, sim, dquery, torch.empty_like(scalar)


_contrastive = register(
    "contrastive(Tensor query, Tensor? teacher, Tensor keys, Tensor queue, Tensor temp, float alpha, Tensor? own, "
    "Tensor? query_ids, Tensor? key_ids, Tensor? queue_ids, Tensor? queue_length, bool gradient, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)


# ---------------------------------------------------------------------------------------------------------- torch


def _torch(
    query, teacher, keys, queue, temp, alpha, own, query_ids, key_ids, queue_ids, queue_length, gradient
):  # fmt: skip
    """One pass over chunks of the keys, as attention does it: sums of keys weighted by P, w and y are all there is.

    With t = alpha E_w[k] + (1 - alpha) E_y[k]: loss = lse - q t / tau, dq = (E_P[k] - t) / tau, dtau = -q dq / tau.
    """
    B, E = query.shape
    q = query.float() / temp
    rows = q if teacher is None else torch.cat([q, teacher.float() / temp])  # one product for both
    top = rows.new_full((len(rows),), -torch.inf)
    # from which row on the keys are summed: the loss alone asks for the teacher's
    expecting = 0 if gradient else B
    total, weighted = torch.zeros_like(top), torch.zeros_like(rows[expecting:])
    sim = q.new_empty(B, len(keys))
    positive_keys, positives = q.new_zeros(B, E), q.new_zeros(B)
    for start, k, row, column in _chunks(rows, keys, queue, own, query_ids, key_ids, queue_ids, queue_length):
        x = rows @ k
        if start < len(keys):
            sim[:, start : start + k.shape[1]] = x[:B]
        if row is not None:
            positive_keys.index_add_(0, row, k.t()[column])
            positives.index_add_(0, row, q.new_ones(len(row)))
        new = torch.maximum(top, x.amax(1))
        x = x.sub_(new[:, None]).exp_()
        old = (top - new).exp_()
        top = new
        total.mul_(old).add_(x.sum(1))
        weighted.mul_(old[expecting:, None]).addmm_(x[expecting:], k.t())
    lse = top[:B] + total[:B].log()
    expected = weighted.div_(total[expecting:, None])
    target = positive_keys * ((1 - alpha) / positives)[:, None]
    if teacher is not None:
        target = target.add_(expected[-B:], alpha=alpha)
    loss = (lse - (q * target).sum(1)).mean()
    if not gradient:
        return loss, sim, q.new_empty(0, E), q.new_zeros(())
    dquery = (expected[:B] - target) / (temp * B)
    return loss, sim, dquery, -(q * dquery).sum()


def _chunks(
    rows, keys, queue, own, query_ids, key_ids, queue_ids, queue_length
) -> Iterator[tuple[int, Tensor, Tensor | None, Tensor | None]]:
    """(position, keys [E, C] fp32, row and column of each positive pair) of the batch's keys, then of the queue's."""
    N, Q = len(keys), queue.shape[1]
    size = max(64, CHUNK.get(rows.device.type, CHUNK["cpu"]) // max(1, len(rows)))
    used = Q if queue_length is None else min(Q, int(queue_length))
    for base, count, columns, ids in ((0, N, keys.t(), key_ids), (N, used, queue, queue_ids)):
        for start in range(0, count, size):
            stop = min(start + size, count)
            match = None
            if ids is not None:
                match = query_ids[:, None] == ids[start:stop]
            if base == 0 and own is not None:
                mine = own[:, None] == torch.arange(start, stop, device=own.device)
                match = mine if match is None else match | mine
            pairs = (None, None) if match is None else match.nonzero(as_tuple=True)
            yield base + start, columns[:, start:stop].float(), *pairs


# --------------------------------------------------------------------------------------------------------- triton

# Interpreted on a CPU, tiles are small so that small queues have several of them.
_INTERPRETED = {"BM": 16, "BN": 16, "num_warps": 4, "num_stages": 1}
_table_says = backends.triton_serves(OP, bucket="small")


def _config(bucket: str, query: Tensor) -> Mapping[str, Any]:
    """Not `tuned`: whatever the query's dtype, the kernels compute in fp16."""
    return table.lookup(OP, backends.arch(query.device.index), bucket) if query.is_cuda else _INTERPRETED


def _kernels_serve(query: Tensor) -> bool:
    rounded = query.dtype in backends.HALVES or input_precision() == "tf32"
    rounded = rounded or autocast_dtype(query) is not None
    return rounded and query.shape[-1] <= KERNEL_WIDTH and _table_says(query)


backends.register(OP, triton=_kernels_serve, torch=backends.always)
