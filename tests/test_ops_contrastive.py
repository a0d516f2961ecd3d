"""The contrastive loss streams over the queue and is the dense loss all the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from blipfast import backends, reference
from blipfast.ops import contrastive
from blipfast.ops.contrastive import contrastive_loss

BACKENDS = ["torch", "triton"]
B, N, Q, E = 19, 22, 70, 20


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(contrastive.CHUNK, "cpu", 64 * B)


def features(*shape: int, seed: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    """Unit vectors that fp16 holds exactly, so that products of the kernels are exact as well."""
    x = F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return x.half().to(dtype).to(device)


def inputs(B=B, N=N, Q=Q, E=E, **kind) -> dict[str, torch.Tensor]:
    return {
        "query": features(B, E, seed=0, **kind),
        "teacher": features(B, E, seed=1, **kind),
        "keys": features(N, E, seed=2, **kind),
        "queue": features(Q, E, seed=3, **kind).t().contiguous(),
        "temp": torch.tensor(0.07, device=kind.get("device", "cpu")),
    }


def positives(name: str, B=B, N=N, Q=Q, device="cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    own = torch.arange(B) + (N - B)
    pool = torch.tensor([-100, 0, 1, 5, 2**31, 2**40, 2**40 + 1])
    ids = {
        key: pool[torch.randint(7, (n,), generator=generator)]
        for key, n in (("query", B), ("key", N), ("queue", Q))
    }
    ids["key"][own] = ids["query"]  # as in retrieval: everybody finds himself
    chosen = {
        "own": {"own": own},
        "ids": {"query_ids": ids["query"], "key_ids": ids["key"], "queue_ids": ids["queue"]},
        "ids of the batch": {"query_ids": ids["query"], "key_ids": ids["key"]},
    }
    chosen["own and ids, part of the queue"] = (
        chosen["own"] | chosen["ids"] | {"queue_length": torch.tensor([2 * Q // 3])}
    )
    chosen["own, none of the queue"] = chosen["own"] | {"queue_length": torch.tensor(0)}
    return {key: value.to(device) for key, value in chosen[name].items()}


FORMS = ["own", "ids", "ids of the batch", "own and ids, part of the queue", "own, none of the queue"]


def dense(query, teacher, keys, queue, temp, alpha, *, dtype=torch.float64, sums=None, **form):
    """The whole matrix, by the reference: loss and similarities of the batch. Products in `dtype`, sums in `sums`."""
    length = form.get("queue_length")
    queue = queue if length is None else queue[:, : int(length)]
    y = query.new_zeros(len(query), len(keys) + queue.shape[1], dtype=torch.bool)
    if "own" in form:
        y |= F.one_hot(form["own"], y.shape[1]).bool()
    if "key_ids" in form:
        y[:, : len(keys)] |= form["query_ids"][:, None] == form["key_ids"]
    if "queue_ids" in form:
        y[:, len(keys) :] |= form["query_ids"][:, None] == form["queue_ids"][: queue.shape[1]]
    query, keys, temp = query.to(dtype), torch.cat([keys.t(), queue], 1).to(dtype), temp.to(dtype)
    teacher = query.detach() if teacher is None else teacher.to(dtype)
    targets = reference.itc_targets(teacher, keys, y.to(dtype), temp.detach(), alpha)
    sim = query @ keys / temp
    return reference.itc_loss(query, keys, targets, temp), sim[:, : y.shape[1] - queue.shape[1]]


def differentiate(function, data, alpha, form, **options):
    """Loss, similarities, and the gradients of 3 times the loss in query and temperature."""
    data = data | {name: data[name].detach().clone().requires_grad_() for name in ("query", "temp")}
    loss, sim = function(**data, alpha=alpha, **form, **options)
    (3 * loss).backward()
    return loss.detach(), sim.detach(), data["query"].grad, data["temp"].grad


def relative(got, want) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_similarities_and_gradients_are_those_of_the_dense_formula(backend, form, alpha, poison_empty):
    data, form = inputs(), positives(form)
    with backends.use(contrastive=backend):
        loss, sim, dquery, dtemp = differentiate(contrastive_loss, data, alpha, form)
    want_loss, want_sim, want_dquery, want_dtemp = differentiate(dense, data, alpha, form)
    assert (loss.dtype, sim.dtype, dquery.dtype) == (torch.float32,) * 3
    # the loss is a difference of numbers of the size 1 / temp
    assert abs(loss - want_loss) < 1e-5 and (sim - want_sim).abs().max() < 1e-5
    assert relative(dquery, want_dquery) < (1e-6 if backend == "torch" else 5e-4)  # ds is fp16 in the kernels
    assert relative(dtemp, want_dtemp) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_temperature_at_its_floor_and_all_of_the_teacher_are_right(backend):
    data, form = inputs() | {"temp": torch.tensor(0.001)}, positives("ids")
    with backends.use(contrastive=backend):
        loss, _, dquery, dtemp = differentiate(contrastive_loss, data, 1.0, form)
    want_loss, _, want_dquery, want_dtemp = differentiate(dense, data, 1.0, form)
    assert abs(loss - want_loss) < 1e-3
    assert relative(dquery, want_dquery) < 1e-3 and relative(dtemp, want_dtemp) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_features_and_queue_serve_as_they_are(backend):
    data, form = inputs(dtype=torch.float16), positives("ids")
    with backends.use(contrastive=backend):
        loss, _, dquery, _ = differentiate(contrastive_loss, data, 0.4, form)
    want_loss, _, want_dquery, _ = differentiate(dense, data, 0.4, form)
    assert abs(loss - want_loss) < 1e-5 and loss.dtype == torch.float32
    assert dquery.dtype == torch.float16 and relative(dquery, want_dquery) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [dict(B=1, N=1, Q=1), dict(B=3, N=3, Q=0), dict(B=2, N=40, Q=5, E=33)])
def test_tiny_batches_and_an_empty_queue_are_right(backend, sizes):
    data, form = inputs(**sizes), positives("own", **{k: v for k, v in sizes.items() if k != "E"})
    with backends.use(contrastive=backend):
        loss, _, dquery, _ = differentiate(contrastive_loss, data, 0.4, form)
    want_loss, _, want_dquery, _ = differentiate(dense, data, 0.4, form)
    assert abs(loss - want_loss) < 1e-5
    assert relative(dquery, want_dquery) < 1e-3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_and_a_row_without_positives_divide_by_zero(backend):
    with backends.use(contrastive=backend):
        loss, sim = contrastive_loss(**inputs(B=0), alpha=0.4, own=torch.zeros(0, dtype=torch.int64))
        assert loss.isnan() and sim.shape == (0, N)
        ids = {"query_ids": torch.zeros(2, dtype=torch.int64), "key_ids": torch.tensor([1, 0])}
        assert contrastive_loss(**inputs(B=2, N=2, Q=3), alpha=0.4, **ids)[0].isfinite()
        ids["query_ids"] = torch.tensor([0, 7])
        assert contrastive_loss(**inputs(B=2, N=2, Q=3), alpha=0.4, **ids)[0].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_queue_may_be_overwritten_before_backward(backend):
    data, form = inputs(B=4, N=4, Q=20), positives("own", B=4, N=4, Q=20)
    _, _, want, _ = differentiate(dense, data, 0.4, form)
    query = data["query"].clone().requires_grad_()
    with backends.use(contrastive=backend):
        loss, _ = contrastive_loss(**data | {"query": query}, alpha=0.4, **form)
    data["queue"].zero_()
    (3 * loss).backward()
    assert relative(query.grad, want) < 5e-4


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_alone_is_the_same(backend, alpha):
    data, form = inputs(), positives("ids")
    with backends.use(contrastive=backend):
        alone, sim = contrastive_loss(**data, alpha=alpha, **form)
        loss, want_sim, _, _ = differentiate(contrastive_loss, data, alpha, form)
    assert abs(alone - loss) < 1e-6 and torch.equal(sim, want_sim) and not alone.requires_grad


def test_nothing_of_the_size_of_the_queue_is_made():
    data, form = inputs(Q=4000), positives("ids", Q=4000)
    with torch.profiler.profile(profile_memory=True) as profile, backends.use(contrastive="torch"):
        differentiate(contrastive_loss, data, 0.4, form)
    assert 0 < max(event.self_cpu_memory_usage for event in profile.events()) < 4 * B * 4000 / 10


def test_non_contiguous_inputs_are_read_right():
    data, form = inputs(), positives("ids")
    scattered = {name: torch.stack([x, x], -1)[..., 0] for name, x in data.items()}
    for backend in BACKENDS:
        with backends.use(contrastive=backend):
            assert torch.equal(
                contrastive_loss(**scattered, alpha=0.4, **form)[0],
                contrastive_loss(**data, alpha=0.4, **form)[0],
            )


def test_autocast_changes_nothing_on_the_cpu():
    data, form = inputs(), positives("ids")
    plain = differentiate(contrastive_loss, data, 0.4, form)
    with torch.autocast("cpu", torch.bfloat16):
        under = differentiate(contrastive_loss, data, 0.4, form)
    assert all(torch.equal(a, b) for a, b in zip(plain, under))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_a_proper_operator(backend):
    data, form = inputs(B=4, N=4, Q=20), positives("own and ids, part of the queue", B=4, N=4, Q=20)
    rest = [form[name] for name in ("own", "query_ids", "key_ids", "queue_ids", "queue_length")]
    for gradient in (True, False):
        torch.library.opcheck(
            torch.ops.blipfast.contrastive.default, (*data.values(), 0.4, *rest, gradient, backend)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_whole_and_checkpoints(backend):
    data, form = inputs(B=4, N=4, Q=20), positives("ids", B=4, N=4, Q=20)
    torch._dynamo.reset()  # a compiled function keeps the backend it was traced with
    with backends.use(contrastive=backend):
        want = differentiate(contrastive_loss, data, 0.4, form)
        compiled = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")
        got = differentiate(compiled, data, 0.4, form)

        def checkpointed(**arguments):
            return checkpoint(contrastive_loss, **arguments, use_reentrant=False)

        again = differentiate(checkpointed, data, 0.4, form)
    for each in (got, again):
        assert all(torch.equal(a, b) for a, b in zip(each, want))


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(query=torch.zeros(B)), "query must have shape"),
        (dict(teacher=torch.zeros(B + 1, E)), "teacher must have shape"),
        (dict(keys=torch.zeros(N, E + 1)), "keys must have shape"),
        (dict(queue=torch.zeros(Q, E)), "queue must have shape"),
        (dict(keys=torch.zeros(0, E)), "keys of the batch"),
        (dict(keys=torch.zeros(N, E, dtype=torch.float64)), "keys must be one of"),
        (dict(keys=torch.zeros(N, E, requires_grad=True)), "no gradient flows to keys"),
        (dict(queue=torch.zeros(E, Q, device="meta")), "queue is on meta"),
        (dict(temp=torch.ones(2)), "temp must be one number"),
        (dict(alpha=1.5), "alpha must be between 0 and 1"),
        (dict(teacher=None), "need teacher features"),
        (dict(own=None), "which keys are positives"),
        (dict(own=torch.zeros(B)), "own must be one of"),
        (dict(own=torch.zeros(N, dtype=torch.int64)), "own must have shape"),
        (dict(key_ids=torch.zeros(N, dtype=torch.int64)), "come together"),
        (dict(queue_ids=torch.zeros(Q, dtype=torch.int64)), "come together"),
        (dict(queue_length=torch.zeros(2, dtype=torch.int64)), "queue_length must be one number"),
    ],
)
def test_wrong_inputs_are_refused_by_name(change, complaint):
    arguments = inputs() | {"alpha": 0.4, "own": torch.arange(B)} | change
    with pytest.raises(ValueError, match=complaint):
        contrastive_loss(**arguments)


# ------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu_the_error_is_at_most_twice_that_of_plain_pytorch(form, dtype):
    sizes = dict(B=130, N=260, Q=5000)
    data = inputs(**sizes, E=256, dtype=dtype, device="cuda")
    form = positives(form, **sizes, device="cuda")
    with backends.use(contrastive="triton"):
        ours = differentiate(contrastive_loss, data, 0.4, form)
    plain = differentiate(dense, data, 0.4, form, dtype=dtype)
    exact = differentiate(dense, data, 0.4, form)
    for name, got, same_dtype, want in zip(("loss", "sim", "dquery", "dtemp"), ours, plain, exact):
        error, allowed = (got - want).abs().max(), 2 * (same_dtype - want).abs().max()
        assert error <= allowed + 1e-4 * want.abs().max(), name


@pytest.mark.gpu
def test_on_a_gpu_an_fp32_queue_costs_the_precision_of_tf32():
    sizes = dict(B=512, N=512, Q=57600)
    data = inputs(**sizes, E=256, device="cuda")
    data["queue"] = F.normalize(torch.randn(57600, 256, device="cuda"), dim=-1).t().contiguous()
    form = positives("own", **sizes, device="cuda")
    with backends.use(contrastive="triton"):
        loss, _, dquery, _ = differentiate(contrastive_loss, data, 0.4, form)
    want_loss, _, want_dquery, _ = differentiate(dense, data, 0.4, form)
    assert abs(loss - want_loss) < 2e-3 and relative(dquery, want_dquery) < 2e-3


@pytest.mark.gpu
def test_on_a_gpu_fifty_repeats_are_identical():
    sizes = dict(B=130, N=130, Q=5000)
    data, form = inputs(**sizes, E=256, device="cuda"), positives("ids", **sizes, device="cuda")
    with backends.use(contrastive="triton"):
        first = differentiate(contrastive_loss, data, 0.4, form)
        for _ in range(50):
            again = differentiate(contrastive_loss, data, 0.4, form)
            assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.gpu
def test_on_a_gpu_a_queue_of_more_than_2_31_elements_is_right():
    Q = 2**23 + 64  # times 256
    data = inputs(B=4, N=4, Q=64, E=256, dtype=torch.float16, device="cuda")
    form = positives("own", B=4, N=4, Q=64, device="cuda")
    with backends.use(contrastive="triton"):
        queue = torch.zeros(256, Q, dtype=torch.float16, device="cuda")
        queue[:, -64:] = data["queue"]  # the others are at right angles to everything: a logit of 0
        loss, _ = contrastive_loss(**data | {"queue": queue}, alpha=0.0, **form)
    sim = (
        data["query"].double()
        @ torch.cat([data["keys"].t(), data["queue"]], 1).double()
        / data["temp"].double()
    )
    lse = torch.logaddexp(sim.logsumexp(1), torch.tensor(float(Q - 64)).double().log().cuda())
    assert abs(loss - (lse - sim[:, :4].diagonal()).mean()) < 1e-3
