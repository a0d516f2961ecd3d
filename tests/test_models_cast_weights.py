"""Weights that are cast together: the same numbers and gradients as autocast gives one by one, in fewer calls."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from blipfast.models import cast_weights as casting
from blipfast.models.blip_pretrain import blip_pretrain
from blipfast.models.cast_weights import cast_weights

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


class Casts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
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
