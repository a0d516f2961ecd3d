"""What holds for every operation with gradients: strided inputs, derivatives, autocast around backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from blipfast.ops.attention import Layout, attention, attention_qkv, attention_varlen
from blipfast.ops.contrastive import contrastive_loss
from blipfast.ops.layer_norm import add_layer_norm
from blipfast.ops.linear_cross_entropy import linear_cross_entropy
from blipfast.ops.mlp import mlp
from blipfast.ops.patch_embed import patch_embed

# The interpreter remarks upon what lies in the columns beyond the vocabulary, which is not used.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
TEXTS, IMAGES = Layout([3, 4], device="cpu"), Layout([3, 4], [9, 9], [1, 0], device="cpu")


def floats(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def itc(query, temp, teacher, keys, queue, own, query_ids, key_ids, queue_ids, queue_length):
    ids = dict(own=own, query_ids=query_ids, key_ids=key_ids, queue_ids=queue_ids, queue_length=queue_length)
    return contrastive_loss(query, teacher, keys, queue, temp, 0.4, **ids)[0]


def cross_entropy(hidden, weight, bias, labels, factors, reduction="sum"):
    how = dict(token_weights=factors, label_smoothing=0.1, reduction=reduction)
    return linear_cross_entropy(hidden, weight, bias, labels, **how).sum()


# of each: the function, tensors that learn, and tensors that do not
OPS: dict[str, tuple[Callable[..., Tensor], list[Tensor], list[Tensor]]] = {
    "attention": (attention, floats((1, 2, 5, 32), (1, 2, 9, 32), (1, 2, 9, 32)), []),
    "attention of a projection": (attention_qkv, floats((2, 5, 3, 2, 32)), []),
    "attention of texts": (lambda *qkv: attention_varlen(qkv, TEXTS, causal=True), floats(*[(7, 2, 32)] * 3), []),
    "attention to images": (lambda *parts: attention_varlen(parts, IMAGES), floats((7, 2, 32), (2, 9, 2, 2, 32)), []),
    "layer_norm": (lambda *x: sum(add_layer_norm(*x)), floats((6, 40), (6, 40), (40,), (40,)), []),
    "mlp": (mlp, floats((6, 32), (48, 32), (48,), (32, 48), (32,)), []),
    "patch_embed": (
        lambda weight, bias, cls, pos, images: patch_embed(images, weight, bias, cls, pos),
        floats((16, 3, 8, 8), (16,), (1, 1, 16), (1, 5, 16)),
        floats((2, 3, 16, 16)),
    ),
    "linear_cross_entropy": (
        cross_entropy,
        floats((6, 32), (40, 32), (40,)),
        [torch.tensor([3, -100, 0, 39, 7, 7]), torch.rand(6)],
    ),
    "linear_cross_entropy, one by one": (
        lambda *x: cross_entropy(*x, reduction="none"),
        floats((6, 32), (40, 32), (40,)),
        [torch.tensor([3, -100, 0, 39, 7, 7]), torch.rand(6)],
    ),
    "contrastive": (
        itc,
        [floats((4, 16))[0].half().float(), torch.tensor(2.0)],  # TF32 and fp16 hold them exactly
        [
            *(x.half().float() for x in floats((4, 16), (6, 16), (16, 24))),
            *(torch.arange(4) + 1, torch.arange(4), torch.arange(6) % 4, torch.arange(24) % 5),
            torch.tensor([20]),
        ],
    ),
}  # fmt: skip


@pytest.fixture(params=OPS)
def op(request, monkeypatch):
    """Chunks are small, so that there are several."""
    from blipfast.ops import contrastive, linear_cross_entropy

    monkeypatch.setitem(contrastive.CHUNK, "cpu", 32)
    monkeypatch.setitem(linear_cross_entropy.ROWS, "cpu", 4)
    return OPS[request.param]


def strided(x: Tensor) -> Tensor:
    """The same numbers, with others between them."""
    if not x.ndim:
        return x
    apart = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 99, dtype=x.dtype)
    apart[..., ::2] = x
    return apart[..., ::2]


def run(function, learnt: list[Tensor], given: list[Tensor], change=lambda x: x) -> list[Tensor]:
    """Output and gradients, of tensors that were changed."""
    leaves = [x.clone().requires_grad_() for x in learnt]
    out = function(*map(change, leaves), *map(change, given))
    weight = torch.linspace(-1, 2, out.numel()).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def strided_leaf(x: Tensor) -> Tensor:
    """As `strided`, for what wants a gradient, too."""
    return StridedLeaf.apply(x) if x.requires_grad else strided(x)


class StridedLeaf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return strided(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def assert_near(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """As bf16 rounds."""
    for a, b in zip(got, want, strict=True):
        assert (a.float() - b).norm() <= 0.03 * b.norm() + 1e-3


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_strided_tensors_give_what_contiguous_ones_do(op, backend):
    assert_same(run(*op, change=strided_leaf), run(*op))


def test_strided_tensors_without_gradients_too(op, backend):
    function, learnt, given = op
    with torch.no_grad():
        got, want = (function(*map(change, [*learnt, *given])) for change in (strided, torch.clone))
    assert_same([got], [want])


def test_backward_may_run_under_autocast_though_forward_did_not(op, backend):
    function, learnt, given = op
    want = run(*op)
    leaves = [x.clone().requires_grad_() for x in learnt]
    out = function(*leaves, *given)
    weight = torch.linspace(-1, 2, out.numel()).view(out.shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(torch.autograd.grad(out, leaves, weight), want[1:])


def test_a_second_derivative_of_a_kernel_is_refused(op, triton):
    function, learnt, given = op
    leaves = [x.clone().requires_grad_() for x in learnt]
    first = torch.autograd.grad(function(*leaves, *given).square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_autocast_costs_what_bf16_rounds(op):
    want = run(*op)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(run(*op), want)
