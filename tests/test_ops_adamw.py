"""AdamW + moving average in one step: both backends against torch.optim.AdamW and lerp."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from blipfast import backends
from blipfast.ops.adamw import AdamWEma, FusedStep

SHAPES = [(), (1,), (7,), (33, 31), (0, 4), (1024,), (3, 1024), (1025,)]
SETTINGS = dict(lr=3e-3, betas=(0.9, 0.98), eps=1e-8)


def model(device="cpu", shapes=SHAPES):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random).to(device).requires_grad_() for shape in shapes]


def give_gradients(params, seed, dtype=torch.float32):
    """Rounded to `dtype`, so that both sides get the same numbers."""
    random = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=random).to(dtype).to(p)


def averages_of(params):
    return [(p, p.detach() * 0.5) for p in params]


def groups(params):
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


def assert_near(got, want, tolerance=2e-6):
    assert got.shape == want.shape and got.dtype == want.dtype
    if got.numel():
        assert (got - want).abs().max() <= tolerance * want.abs().max().clamp_min(1e-3)  # NaN fails as well


def test_steps_equal_torch_and_lerp(backend):
    ours, theirs = model(), model()
    averages, wanted = averages_of(ours), averages_of(theirs)
    optimizer = AdamWEma(groups(ours), averages, **SETTINGS)
    plain = torch.optim.AdamW(groups(theirs), fused=True, **SETTINGS)
    for step in range(5):
        for params in (ours, theirs):
            give_gradients(params, step)
        for group in (*optimizer.param_groups, *plain.param_groups):
            group["lr"] = 1e-3 * (step + 1)
        optimizer.step(momentum=0.9)
        plain.step()
        torch._foreach_lerp_([a for _, a in wanted], [p.detach() for p in theirs], 1 - 0.9)
    for p, q in zip(ours, theirs):
        assert_near(p.detach(), q.detach())
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert_near(optimizer.state[p][key], plain.state[q][key])
    for (_, a), (_, b) in zip(averages, wanted):
        assert_near(a, b)


def test_the_first_bias_correction_is_exact(backend):
    """After one step every weight has moved by lr against its gradient's sign, whatever the gradient's size."""
    p = torch.zeros(300, requires_grad=True)
    p.grad = torch.linspace(-5, 7, 300)
    AdamWEma([p], lr=1e-3, betas=(0.9, 0.9999), eps=1e-12, weight_decay=0.0).step()
    assert_near(p.detach(), -1e-3 * torch.sign(p.grad), 1e-6)


def test_without_momentum_the_averages_stay(backend):
    params = model()
    averages = averages_of(params)
    before = [a.clone() for _, a in averages]
    give_gradients(params, 0)
    AdamWEma(params, averages).step()
    assert all(torch.equal(a, b) for (_, a), b in zip(averages, before))


def test_weights_without_gradient_stay_and_their_averages_move(backend):
    params = model(shapes=[(40,), (50,), (60,)])
    frozen = params.pop().detach()
    averages = averages_of([*params, frozen])
    before = [p.detach().clone() for p in (*params, frozen)]
    optimizer = AdamWEma(params, averages, weight_decay=0.1)
    params[0].grad = torch.ones(40)
    optimizer.step(momentum=0.75)
    assert not torch.equal(params[0].detach(), before[0])
    assert torch.equal(params[1].detach(), before[1]) and torch.equal(frozen, before[2])
    assert (optimizer.state[params[0]]["step"], optimizer.state[params[1]]["step"]) == (1, 0)
    for (p, average), old in zip(averages, before):
        assert_near(average, 0.75 * 0.5 * old + 0.25 * p.detach())


def test_state_dict_goes_both_ways(backend):
    ours, theirs = model(), model()
    optimizer, plain = AdamWEma(ours, **SETTINGS), torch.optim.AdamW(theirs, fused=True, **SETTINGS)
    give_gradients(theirs, 0)
    plain.step()
    give_gradients(ours, 0)
    optimizer.step()  # tables are made for the state that loading replaces
    with torch.no_grad():
        for p, q in zip(ours, theirs):
            p.copy_(q)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    for params, it in ((ours, optimizer), (theirs, plain)):
        give_gradients(params, 1)
        it.step()
    for p, q in zip(ours, theirs):
        assert_near(p.detach(), q.detach())
    torch.optim.AdamW(model(), fused=True).load_state_dict(optimizer.state_dict())


def test_a_moved_tensor_is_found_again(backend):
    p, q = (torch.ones(600, requires_grad=True) for _ in range(2))
    optimizer, plain = AdamWEma([p]), torch.optim.AdamW([q], fused=True)
    for step in range(3):
        p.data = p.data.clone()
        for params in ([p], [q]):
            give_gradients(params, step)
        optimizer.step()
        plain.step()
    assert_near(p.detach(), q.detach())


def state(params, **more):
    zeros = [torch.zeros_like(p) for p in params]
    steps = [torch.zeros(()) for _ in params]
    return FusedStep(params, zeros, [z.clone() for z in zeros], steps, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_may_be_half_and_are_scaled(dtype, backend):
    ours, theirs = ([p.detach() for p in model()] for _ in range(2))
    plain = torch.optim.AdamW(theirs, fused=True, weight_decay=0.01)
    scale = torch.tensor([0.25])
    grads = [torch.randn(p.shape).to(dtype) for p in ours]
    kept = [grad.clone() for grad in grads]
    state(ours, weight_decay=0.01)(grads, lr=1e-3, grad_scale=scale)
    for p, grad in zip(theirs, kept):
        p.grad = grad.float() * 0.25
    plain.step()
    for p, q in zip(ours, theirs):
        assert_near(p, q)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_makes_it_a_step_without_gradients(scale, backend):
    params = model()
    averages = averages_of(params)
    optimizer = AdamWEma(params, averages, weight_decay=0.1)
    give_gradients(params, 0)
    optimizer.step(momentum=0.9, grad_scale=torch.tensor(1.0))
    before = copy.deepcopy([(p.detach(), a, optimizer.state[p]) for p, a in averages])
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.momentum, optimizer.grad_scale = 0.75, torch.tensor(scale)
    optimizer.step()  # takes its arguments from the attributes
    for (p, average), (weight, old, state) in zip(averages, before):
        assert torch.equal(p.detach(), weight)
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in state.items())
        assert_near(average, 0.75 * old + 0.25 * weight)
    give_gradients(params, 1)
    optimizer.step(grad_scale=torch.tensor(1.0))
    assert all(optimizer.state[p]["step"] == 2 and p.isfinite().all() for p in params)


def test_copies_are_the_rounded_weights_and_averages(backend, poison_empty):
    params = [p.detach() for p in model()]
    averages = [p * 0.5 for p in params]
    copies, average_copies = ([torch.empty_like(p, dtype=torch.float16) for p in params] for _ in range(2))
    copies[2] = average_copies[3] = None
    fused = state(params, averages=averages, copies=copies, average_copies=average_copies)
    fused([torch.ones_like(p) for p in params], lr=1e-2, momentum=0.9)
    for targets, sources in ((copies, params), (average_copies, averages)):
        assert all(c is None or torch.equal(c, source.half()) for c, source in zip(targets, sources))


def test_unaligned_views_and_strided_gradients_are_right(backend):
    flat = torch.randn(1200)
    ours, theirs = [flat[1:601].view(20, 30)], [flat[1:601].view(20, 30).clone()]
    rest = flat[601:].clone()
    grad = torch.randn(30, 20).t()
    plain = torch.optim.AdamW(theirs, fused=True, weight_decay=0.0)
    theirs[0].grad = grad.contiguous()
    plain.step()
    state(ours)([grad], lr=1e-3)
    assert_near(ours[0], theirs[0])
    assert torch.equal(flat[601:], rest)


def test_another_configuration_cuts_the_tensors_anew(triton, monkeypatch):
    from blipfast.ops import adamw

    params = [p.detach() for p in model()]
    averages = [torch.zeros_like(p) for p in params]
    fused = FusedStep(params, averages=averages)
    for config in ({"chunk": 1024, "block": 512}, {"chunk": 512, "block": 128}):
        monkeypatch.setattr(adamw, "_INTERPRETED", {**config, "num_warps": 4})
        fused([None] * len(params), lr=0.0, momentum=0.5)
    for p, a in zip(params, averages):
        assert_near(a, 0.75 * p)
    monkeypatch.setattr(adamw, "_INTERPRETED", {"chunk": 512, "block": 1024, "num_warps": 4})
    with pytest.raises(ValueError, match="block must divide chunk"):
        fused([None] * len(params), lr=0.0, momentum=0.5)


def test_average_alone_needs_no_optimizer_state(backend):
    params = [p.detach() for p in model()]
    averages = [torch.zeros_like(p) for p in params]
    fused = FusedStep(params, averages=averages)
    fused([None] * len(params), lr=0.0, momentum=0.9)
    for p, a in zip(params, averages):
        assert_near(a, 0.1 * p)
    FusedStep([])([], lr=0.1)


P = torch.zeros(4, 4)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(averages=[torch.zeros(4)]), r"averages\[0\] must have params\[0\]'s shape"),
        (dict(averages=[P.half()]), r"averages\[0\] must be one of \[torch.float32\]"),
        (dict(averages=[torch.zeros(4, 4).t()[:, :].as_strided((4, 4), (1, 4))]), "must be contiguous"),
        (dict(averages=[P, P]), "averages has 2 entries for 1 params"),
        (dict(exp_avgs=[P]), "needs exp_avg, exp_avg_sq and step"),
        (dict(copies=[P]), "copies must share one of"),
        (dict(copies=[P.half()], average_copies=[P.bfloat16()]), "copies must share one of"),
        (dict(averages=[torch.zeros(4, 4, device="meta")]), "is on meta"),
        (dict(averages=[P]), "is the parameter itself"),
        (dict(average_copies=[P.half()]), "has no average"),
        (dict(exp_avgs=[P], exp_avg_sqs=[P], steps=[torch.zeros(3)]), "must be one number"),
    ],
)
def test_lists_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=f"adamw: .*{message}"):
        FusedStep([P], **given)


@pytest.mark.parametrize(
    "grads, more, message",
    [
        ([P, P], {}, "2 grads for 1 params"),
        ([torch.zeros(4)], {}, "differs in shape or device"),
        ([P.double()], {}, "grads must share one of"),
        ([P], dict(grad_scale=torch.ones(2)), "grad_scale must be one number"),
        ([P], dict(grad_scale=torch.ones(1).half()), "grad_scale must be one of"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(grads, more, message, backend):
    with pytest.raises(ValueError, match=f"adamw: .*{message}"):
        state([P])(grads, lr=0.1, **more)


def test_gradients_without_state_and_groups_that_disagree_are_refused(backend):
    with pytest.raises(ValueError, match="no optimizer state"):
        FusedStep([P])([P], lr=0.1)
    params = model(shapes=[(3,), (4,)])
    with pytest.raises(ValueError, match="a weight has two averages"):
        AdamWEma(params, [(params[0], torch.zeros(3)), (params[0], torch.zeros(3))])
    with pytest.raises(ValueError, match="groups must agree"):
        AdamWEma([{"params": params[:1], "lr": 1.0}, {"params": params[1:]}]).step()
    with pytest.raises(ValueError, match="has no maximize"):
        AdamWEma([{"params": params, "maximize": True}]).step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_as_the_original_does(copied, backend):
    params = model(shapes=[(3,), (4,)])
    averages = [p.detach().clone() for p in params]
    optimizer = AdamWEma(params, list(zip(params, averages)), lr=0.1)
    optimizer.momentum = 0.5
    twin = copied(optimizer)
    for each in (optimizer, twin):
        for _ in range(2):
            for p in each.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            each.step()
    theirs = twin.param_groups[0]["params"]
    assert all(torch.equal(a, b) and a is not b for a, b in zip(params, theirs))
    assert all(torch.equal(a, b) for a, (_, b) in zip(averages, twin._pairs))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_steps_equal_torch_and_repeat_to_the_bit(dtype, triton):
    shapes = [*SHAPES, (30524, 64), (768, 3072)]

    def run():
        params = [p.detach() for p in model("cuda", shapes)]
        averages = [p * 0.5 for p in params]
        copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in params]
        moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        steps = [torch.zeros((), device="cuda") for _ in params]
        fused = FusedStep(params, *moments, steps, weight_decay=0.05, averages=averages, copies=copies)
        for step in range(3):
            give_gradients(params, step)
            grads = [p.grad.to(dtype) for p in params]
            fused(grads, lr=1e-3, momentum=0.9)
        return params, averages, copies

    ours = run()
    assert all(torch.equal(copy, p.bfloat16()) for p, copy in zip(ours[0], ours[2]))
    with backends.use("torch"):
        for got, want in zip(sum(ours[:2], []), sum(run()[:2], [])):
            assert_near(got, want)
    for _ in range(50):
        assert all(map(torch.equal, sum(run(), []), sum(ours, [])))
