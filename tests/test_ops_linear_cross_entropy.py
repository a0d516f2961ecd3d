"""The chunked linear cross-entropy is F.cross_entropy of F.linear, without its logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from blipfast import backends
from blipfast.ops import linear_cross_entropy as op
from blipfast.ops.linear_cross_entropy import linear_cross_entropy

BACKENDS = ["torch", "triton"]
T, D, V = 11, 20, 83
NAMES = ("hidden", "weight", "bias")
# The interpreter remarks upon what lies in the columns beyond the vocabulary, which is not used.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


@pytest.fixture(autouse=True)
def few_rows_a_chunk(monkeypatch):
    monkeypatch.setitem(op.ROWS, "cpu", 4)


def inputs(T=T, D=D, V=V, dtype=torch.float32, device="cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    data = {"hidden": draw(T, D), "weight": draw(V, D) / 2, "bias": draw(V)}
    data = {name: x.to(device, dtype) for name, x in data.items()}
    labels = torch.randint(V, (T,), generator=generator)
    labels[1::3] = -100
    return data | {"labels": labels.to(device)}


def dense(hidden, weight, bias, labels, *, label_smoothing=0.0, token_weights=None, reduction="mean"):
    """All the logits, by PyTorch, in the dtype of the inputs; losses in at least fp32."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), label_smoothing=label_smoothing, reduction="none"
    ).view(labels.shape)
    losses = losses if token_weights is None else losses * token_weights
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (labels != -100).sum()


def differentiate(function, data, upstream=3.0, dtype=None, **options):
    """The loss, and the gradients of its product with `upstream` in hidden, weight and bias."""
    leaves = {
        name: data[name].detach().to(dtype).clone().requires_grad_()
        for name in NAMES
        if data[name] is not None
    }
    loss = function(**data | leaves, **options)
    (loss * upstream).sum().backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves.values())]


def relative(got, want) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradients_are_those_of_the_dense_formula(backend, reduction, label_smoothing, poison_empty):
    data, options = inputs(), dict(reduction=reduction, label_smoothing=label_smoothing)
    upstream = torch.linspace(-2, 3, T) if reduction == "none" else torch.tensor(3.0)
    with backends.use(linear_cross_entropy=backend):
        got = differentiate(linear_cross_entropy, data, upstream, **options)
    want = differentiate(dense, data, upstream, torch.float64, **options)
    assert got[0].dtype == torch.float32 and got[0].shape == want[0].shape
    for name, a, b in zip(("loss", *NAMES), got, want):
        assert relative(a, b) < 2e-6, name


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_token_weights_multiply_the_losses(backend, reduction):
    data, weights = inputs(), torch.linspace(0, 40, T)
    options = dict(reduction=reduction, label_smoothing=0.1, token_weights=weights)
    with backends.use(linear_cross_entropy=backend):
        got = differentiate(linear_cross_entropy, data, **options)
    want = differentiate(dense, data, 3.0, torch.float64, **options)
    assert all(relative(a, b) < 2e-6 for a, b in zip(got, want))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_texts_strided_inputs_and_a_missing_bias_are_right(backend):
    data = inputs(T=12)
    data = {
        "hidden": torch.stack([data["hidden"].view(3, 4, D)] * 2, -1)[..., 0],
        "weight": data["weight"].t().contiguous().t(),
        "bias": None,
        "labels": data["labels"].view(4, 3).t(),
    }
    for reduction in ("none", "mean"):
        with backends.use(linear_cross_entropy=backend):
            got = differentiate(linear_cross_entropy, data, reduction=reduction, label_smoothing=0.1)
        want = differentiate(dense, data, 3.0, torch.float64, reduction=reduction, label_smoothing=0.1)
        assert got[0].shape == want[0].shape
        assert all(relative(a, b) < 2e-6 for a, b in zip(got, want))


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstream", [2.0**20, 2.0**-30])
def test_fp16_products_neither_vanish_nor_overflow_whatever_the_loss_is_multiplied_by(
    backend, reduction, upstream
):
    data, options = inputs(), dict(reduction=reduction, label_smoothing=0.1)
    with torch.autocast("cpu", torch.float16), backends.use(linear_cross_entropy=backend):
        got = differentiate(linear_cross_entropy, data, upstream, **options)
    want = differentiate(dense, data, upstream, torch.float64, **options)
    assert all(relative(a, b) < 2e-3 for a, b in zip(got, want))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_weights_are_served(backend):
    data = inputs(dtype=torch.float16)
    with backends.use(linear_cross_entropy=backend):
        got = differentiate(linear_cross_entropy, data, label_smoothing=0.1)
    want = differentiate(dense, data, 3.0, torch.float64, label_smoothing=0.1)
    assert [x.dtype for x in got] == [torch.float32] + 3 * [torch.float16]
    assert all(relative(a, b) < 2e-3 for a, b in zip(got, want))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_and_certain_predictions_are_exact(backend):
    data = inputs()
    data["hidden"] = data["hidden"] * 100
    data["labels"] = F.linear(data["hidden"], data["weight"], data["bias"]).argmax(1)
    with backends.use(linear_cross_entropy=backend):
        got = differentiate(linear_cross_entropy, data)
    want = differentiate(dense, data, 3.0, torch.float64)
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(got, want))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_banned_words_leave_losses_finite_where_pytorchs_are(backend, label_smoothing):
    data = inputs()
    data["bias"][:3] = -torch.inf
    data["labels"] = data["labels"].where(data["labels"] == -100, data["labels"].clamp(min=3))
    with backends.use(linear_cross_entropy=backend):
        got = differentiate(linear_cross_entropy, data, reduction="sum", label_smoothing=label_smoothing)
    want = differentiate(dense, data, dtype=torch.float64, reduction="sum", label_smoothing=label_smoothing)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_chunks_nan_in_ignored_rows_reaches_no_other_row(backend):
    data = inputs()
    with backends.use(linear_cross_entropy=backend):
        want = differentiate(linear_cross_entropy, data, reduction="sum")
        data["hidden"][data["labels"] == -100] = torch.nan
        loss, hidden, *_ = differentiate(linear_cross_entropy, data, reduction="sum")
    assert torch.equal(loss, want[0]) and torch.equal(hidden, want[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_tokens_it_is_what_pytorch_says(backend):
    with backends.use(linear_cross_entropy=backend):
        for labels in (torch.full((T,), -100), torch.zeros(0, dtype=torch.int64)):
            data = inputs(T=len(labels)) | {"labels": labels}
            assert linear_cross_entropy(**data).isnan()
            assert linear_cross_entropy(**data, reduction="none").tolist() == [0.0] * len(labels)
            loss, *gradients = differentiate(linear_cross_entropy, data, reduction="sum")
            assert loss == 0 and all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_gives_the_same(backend):
    data = inputs()
    hidden = data["hidden"].requires_grad_()
    with backends.use(linear_cross_entropy=backend):
        loss = linear_cross_entropy(**data)
    first, second = (torch.autograd.grad(3 * loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_autocast_sets_the_dtype_of_the_products_and_keeps_that_of_the_gradients():
    data = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        got = differentiate(linear_cross_entropy, data, label_smoothing=0.1)
        want = differentiate(dense, data, label_smoothing=0.1)
    exact = differentiate(dense, data, 3.0, torch.float64, label_smoothing=0.1)
    assert [x.dtype for x in got] == [torch.float32] * 4
    for a, b, c in zip(got, want, exact):
        assert 1e-4 < relative(a, c) <= 2 * relative(b, c) + 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_logits_never_exist_at_once(backend, monkeypatch):
    largest = []
    new_empty = torch.Tensor.new_empty

    def watched(self, *shape, **options):
        made = new_empty(self, *shape, **options)
        largest.append(made.numel())
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", watched)
    data = inputs(T=40, D=3)
    with backends.use(linear_cross_entropy=backend):
        differentiate(linear_cross_entropy, data)
    assert 4 * V <= max(largest) <= 4 * 128


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_a_proper_operator(backend):
    data = inputs(T=5)
    for coefficients, bias in ((torch.ones(5), data["bias"]), (None, None)):
        for gradient in (True, False):
            arguments = (data["hidden"], data["weight"], bias, data["labels"], coefficients)
            arguments += (0.1, -100, torch.float32, backend, gradient)
            torch.library.opcheck(torch.ops.blipfast.linear_cross_entropy.default, arguments)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_whole_and_checkpoints(backend, reduction):
    data, options = inputs(T=5), dict(reduction=reduction, label_smoothing=0.1)
    torch._dynamo.reset()  # a compiled function keeps the backend it was traced with
    with backends.use(linear_cross_entropy=backend):
        want = differentiate(linear_cross_entropy, data, **options)
        compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
        got = differentiate(compiled, data, **options)

        def checkpointed(**arguments):
            return checkpoint(linear_cross_entropy, **arguments, use_reentrant=False)

        again = differentiate(checkpointed, data, **options)
    for each in (got, again):
        assert all(torch.equal(a, b) for a, b in zip(each, want))


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(hidden=torch.tensor(1.0)), "hidden must have shape"),
        (dict(weight=torch.zeros(V, D + 1)), "weight must have shape"),
        (dict(weight=torch.zeros(0, D), bias=None), "at least one row"),
        (
            dict(weight=torch.zeros(V, D, dtype=torch.float16)),
            "weight is torch.float16, hidden is torch.float32",
        ),
        (dict(bias=torch.zeros(V + 1)), "bias must have shape"),
        (dict(labels=torch.zeros(T + 1, dtype=torch.int64)), "labels must have shape"),
        (dict(labels=torch.zeros(T)), "labels must be one of"),
        (dict(labels=torch.full((T,), V)), f"labels must be -100 or from 0 to {V - 1}, got {V}"),
        (dict(labels=torch.zeros(T, dtype=torch.int64, device="meta")), "labels is on meta"),
        (dict(token_weights=torch.ones(T + 1)), "token_weights must have shape"),
        (dict(token_weights=torch.ones(T, requires_grad=True)), "no gradient flows to token_weights"),
        (dict(label_smoothing=1.5), "label_smoothing must be between 0 and 1"),
        (dict(reduction="max"), "reduction must be one of"),
    ],
)
def test_wrong_inputs_are_refused_by_name(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        linear_cross_entropy(**inputs() | change)


# ------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_the_error_is_at_most_twice_that_of_plain_pytorch(dtype, reduction):
    data = inputs(T=2100, D=768, V=30524, dtype=dtype, device="cuda")
    data["weight"] /= 10
    options = dict(reduction=reduction, label_smoothing=0.1)
    upstream = torch.linspace(-1, 1, 2100, device="cuda") if reduction == "none" else 1.0
    with backends.use(linear_cross_entropy="triton"):
        ours = differentiate(linear_cross_entropy, data, upstream, **options)
    plain = differentiate(dense, data, upstream, **options)
    exact = differentiate(dense, data, upstream, torch.float64, **options)
    for name, got, same_dtype, want in zip(("loss", *NAMES), ours, plain, exact):
        error, allowed = (got - want).abs().max(), 2 * (same_dtype - want).abs().max()
        assert error <= allowed + 1e-5 * want.abs().max(), name


@pytest.mark.gpu
def test_on_a_gpu_fp32_weights_get_fp32_gradients_under_autocast():
    data = inputs(T=2100, D=768, V=30524, device="cuda")
    with torch.autocast("cuda", torch.bfloat16), backends.use(linear_cross_entropy="triton"):
        got = differentiate(linear_cross_entropy, data, label_smoothing=0.1)
        plain = differentiate(dense, data, label_smoothing=0.1)
    exact = differentiate(dense, data, 3.0, torch.float64, label_smoothing=0.1)
    assert got[2].dtype == torch.float32
    assert relative(got[2], exact[2]) <= 2 * relative(plain[2], exact[2])


@pytest.mark.gpu
def test_on_a_gpu_fifty_repeats_are_identical():
    data = inputs(T=1500, D=768, V=30524, dtype=torch.bfloat16, device="cuda")
    with backends.use(linear_cross_entropy="triton"):
        first = differentiate(linear_cross_entropy, data, label_smoothing=0.1)
        for _ in range(50):
            again = differentiate(linear_cross_entropy, data, label_smoothing=0.1)
            assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.gpu
def test_on_a_gpu_logits_of_more_than_2_31_elements_are_right_and_labels_beyond_the_vocabulary_are_nan():
    T = 2**31 // 30524 + 100
    data = inputs(T=T, D=64, V=30524, dtype=torch.bfloat16, device="cuda")
    with backends.use(linear_cross_entropy="triton"):
        losses = linear_cross_entropy(**data, reduction="none")
        last = {"hidden": data["hidden"][-64:], "labels": data["labels"][-64:]}
        assert torch.allclose(losses[-64:], dense(**data | last, reduction="none"), atol=0.1)
        data["labels"][3] = 30524
        losses = linear_cross_entropy(**data, reduction="none")
        assert losses[3].isnan() and losses.isnan().sum() == 1
