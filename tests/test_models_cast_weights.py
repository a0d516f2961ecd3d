"""Weights that are cast together: the same numbers and gradients as autocast gives one by one, in fewer calls."""

from __future__ import annotations

import concurrent.futures
import copy
import gc
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from blipfast.models import cast_weights as casting
from blipfast.models import packing
from blipfast.models.blip_pretrain import blip_pretrain
from blipfast.models.cast_weights import cast_weights
from blipfast.models.packed import all_states, image_states
from blipfast.models.packing import Ragged

CAPTIONS = ["a dog", "two red apples", "a picture of a house", "cats"]


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False))


def gradients(model: nn.Module, x: torch.Tensor, *together: nn.Module) -> list[torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        with cast_weights(*together):
            y = model(x)
    y.float().square().sum().backward()
    return [y, *(p.grad for p in model.parameters())]


def test_outputs_and_gradients_are_those_of_autocast():
    model, x = layers(), torch.randn(5, 6)
    plain, together = gradients(copy.deepcopy(model), x), gradients(model, x, model)
    for got, want in zip(together, plain, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_the_layers_have_their_own_weights_back_afterwards_also_after_an_error():
    model = layers()
    own = list(model.parameters())
    with pytest.raises(ZeroDivisionError), torch.autocast("cpu", torch.bfloat16), cast_weights(model):
        assert model[0].weight.dtype == torch.bfloat16 and model[1].weight.dtype == torch.float32
        raise ZeroDivisionError
    assert all(a is b for a, b in zip(model.parameters(), own, strict=True))


def test_weights_that_are_cut_or_not_to_be_cast_stay():
    model = layers()
    with cast_weights(model):
        assert model[0].weight.dtype == torch.float32, "outside autocast"
    model[0].weight.ds_id = 0  # as ZeRO-3 marks them
    model[2].bfloat16()
    kept = model[2].weight
    with torch.autocast("cpu", torch.bfloat16), cast_weights(model):
        assert model[0].weight.dtype == torch.float32 and model[2].weight is kept
        assert model[0].bias.dtype == torch.bfloat16


def test_layers_that_were_replaced_are_gone():
    model = layers()
    with torch.autocast("cpu", torch.bfloat16), cast_weights(model):
        pass
    old = weakref.ref(model[0])
    model[0] = nn.Linear(6, 8)
    gc.collect()
    assert old() is None
    with torch.autocast("cpu", torch.bfloat16), cast_weights(model):
        assert model[0].weight.dtype == torch.bfloat16


def test_layers_without_weights_of_their_own_stay_as_they_are():
    """Pruned ones; replicas, as DataParallel makes them; modules that are None."""
    model = layers()
    model.register_module("none", None)
    pruned = torch.nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    replica = model[2]._replicate_for_data_parallel()
    replica.weight = model[2].weight.detach().clone()
    x = torch.randn(2, 6)
    want = pruned(x)
    with cast_weights(model, replica, stacks=[[pruned, pruned]]):
        assert torch.equal(pruned(x), want)
    with torch.autocast("cpu", torch.bfloat16), cast_weights(model, replica, stacks=[[pruned, pruned]]):
        assert pruned(x).dtype == torch.bfloat16 and replica.weight.dtype == torch.float32
        assert model[2].weight.dtype == torch.bfloat16


def test_a_weight_that_is_not_used_gets_no_gradient():
    model = layers()
    with torch.autocast("cpu", torch.bfloat16), cast_weights(model):
        model[0](torch.randn(2, 6)).sum().backward()
    assert model[2].weight.grad is None and model[0].weight.grad is not None


def test_what_is_frozen_stays_so():
    """A product with a frozen weight must not keep its input for a gradient that nobody wants."""
    model, x = layers(), torch.randn(2, 6)
    model[0].requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16), cast_weights(model):
        assert not model[0](x).requires_grad and model[2].weight.requires_grad
        model(x).sum().backward()
    assert model[0].weight.grad is None and model[2].weight.grad is not None


def test_a_stack_is_cast_into_its_places():
    torch.manual_seed(0)
    one, two, other = nn.Linear(6, 4), nn.Linear(6, 3), nn.Linear(6, 5)
    x = torch.randn(5, 6)

    def gradients(*stacks):
        with torch.autocast("cpu", torch.bfloat16), cast_weights(one, two, other, stacks=stacks) as given:
            assert other.weight.dtype == torch.bfloat16
            y = torch.cat([F.linear(x, *given([one, two])), other(x)], 1)
        return [y, *torch.autograd.grad(y.float().square().sum(), [*one.parameters(), *two.parameters()])]

    for got, want in zip(gradients([one, two]), gradients(), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
    with Casts() as casts:
        gradients([one, two])
    assert casts.cats == 1, "the test's own"
    two.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16), cast_weights(one, two, stacks=[[one, two]]) as given:
        weight, bias = given([one, two])  # they do not learn alike
        assert torch.equal(weight[4:], two.weight) and bias.requires_grad
    assert one.weight.dtype == two.weight.dtype == torch.float32


def test_layers_with_hooks_are_called_one_by_one_where_others_are_stacked(small, monkeypatch):
    """ZeRO-3's, for instance: their weights are there only while they are called."""
    monkeypatch.setattr(packing, "better_stacked", lambda device: True)
    model, called = blip_pretrain(**small, queue_size=8).text_encoder, []
    layers = [*model.encoder.layer[0].attention.self.children()][:3]
    layers += [
        model.encoder.layer[0].crossattention.self.key,
        model.encoder.layer[0].crossattention.self.value,
    ]
    text = Ragged.of([[5, 6, 7], [8, 9]], "cpu")

    def states():
        return all_states(
            model, text, image_states(model.encoder, torch.randn(2, 4, 32, generator=torch.Generator()))
        )

    want = states()
    for layer in layers:
        layer.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(states(), want)
    assert len(called) == 5


class Casts(TorchDispatchMode):
    count = cats = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.cats += op.overloadpacket.__name__ == "cat"
        self.count += op.overloadpacket.__name__ in ("_to_copy", "_foreach_copy_")
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_makes_far_fewer_casts(small, images, checkpointing, monkeypatch):
    torch.manual_seed(0)
    small["med_config"]["num_hidden_layers"] = small["vit"]["depth"] = 4
    small["med_config"]["gradient_checkpointing"] = checkpointing
    model = blip_pretrain(**small, queue_size=8, vit_grad_ckpt=checkpointing, vit_ckpt_layer=4).train()
    state = copy.deepcopy(model.state_dict())

    def step() -> tuple[int, torch.Tensor]:
        model.load_state_dict(state)
        torch.manual_seed(1)
        with Casts() as casts:
            with torch.autocast("cpu", torch.bfloat16):
                loss = sum(model(images, CAPTIONS, 0.4))
            loss.backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
        return casts.count, flat

    together, got = step()
    monkeypatch.setattr(casting, "autocast_dtype", lambda x: None)
    apart, want = step()
    assert together < 0.6 * apart
    # a weight of two passes has two casts, whose gradients add in fp32
    assert (got - want).norm() < 5e-3 * want.norm()


def test_threads_may_share_a_model_under_autocast(monkeypatch):
    real, model = (
        casting.autocast_dtype,
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False),
    )

    def slowly(tensor):  # the moment in which another thread's weights are in place
        time.sleep(0.0005)
        return real(tensor)

    monkeypatch.setattr(casting, "autocast_dtype", slowly)
    x = torch.randn(4, 8)

    def use():
        for _ in range(20):
            with torch.autocast("cpu", torch.bfloat16), cast_weights(model):
                model(x)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(use) for _ in range(4)]:
            done.result()
    assert all(
        type(weight) is nn.Parameter and weight.dtype == torch.float32 for weight in model.parameters()
    )
    assert len(list(model.parameters())) == 4
