"""Layers that were replaced, as by LoRA, do what they say, in training, matching and generation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from blipfast.models import packing
from blipfast.models.blip import blip_decoder
from blipfast.models.blip_itm import blip_itm
from blipfast.models.blip_nlvr import blip_nlvr
from blipfast.models.blip_vqa import blip_vqa
from blipfast.quantize import prepare

TEXTS = ["a cat", "two red apples", "a dog on the beach", "the sea"]


class Lora(nn.Module):
    """As peft's: its `weight` is that of the layer below, without what it adds."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, base_layer.in_features) * 0.3)
        self.b = nn.Parameter(torch.randn(base_layer.out_features, 2) * 0.3)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.a.t() @ self.b.t()


def adapted(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model with Lora on every linear layer, and one whose weights hold the same sums."""
    merged = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and (merged.get_submodule(path).weight is not None):
            parent, _, child = path.rpartition(".")
            lora = Lora(layer)
            setattr(model.get_submodule(parent), child, lora)
            own = merged.get_submodule(path)
            own.weight = nn.Parameter(own.weight.detach() + (lora.b @ lora.a).detach())
    return model.eval(), merged.eval()


@pytest.fixture(params=[False, True], ids=["apart", "stacked"])
def stacks(request, monkeypatch):
    monkeypatch.setattr(packing, "better_stacked", lambda device: request.param)


def losses_and_outputs(model, images) -> list[Tensor]:
    kind = type(model).__name__
    if kind == "BLIP_Decoder":
        with torch.no_grad():
            ids = [model.generate(images, num_beams=n, max_length=9, min_length=7) for n in (1, 3)]
        return [model(images, TEXTS), ids]
    if kind == "BLIP_ITM":
        states = model.visual_encoder(images)
        itc = model(images, TEXTS, "itc")
        torch.testing.assert_close(
            itc, model.image_features(states) @ model.text_features(model.encode_text(TEXTS)).t()
        )
        return [model(images, TEXTS), itc]
    if kind == "BLIP_NLVR":
        return [model(torch.cat([images, images.flip(0)]), TEXTS, None, train=False)]
    answers = ["a dog", "two", "red", "a red dog"]
    ranked = [model(images, TEXTS, answers, train=False, k_test=k).tolist() for k in (1, 4)]
    answered = model(images, TEXTS, None, train=False, inference="generate")
    return [model(images, TEXTS, answers, [1, 1, 1, 1], torch.ones(4)), ranked, answered]


@pytest.mark.parametrize("factory", [blip_decoder, blip_itm, blip_nlvr, blip_vqa])
def test_an_adapted_model_is_the_one_whose_weights_are_merged(factory, small, images, stacks):
    torch.manual_seed(0)
    model, merged = adapted(factory(**small))
    for got, want in zip(losses_and_outputs(model, images), losses_and_outputs(merged, images), strict=True):
        if isinstance(got, Tensor):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        else:
            assert got == want


@pytest.mark.parametrize("factory", [blip_decoder, blip_vqa])
def test_every_adapter_that_was_used_learns(factory, small, images, stacks):
    torch.manual_seed(0)
    model, _ = adapted(factory(**small))
    losses_and_outputs(model, images)[0].backward()
    forgotten = [
        name for name, p in model.named_parameters() if name.endswith((".a", ".b")) and p.grad is None
    ]
    assert not forgotten


class Stored(nn.Module):
    """A layer whose weight is stored in int8, as bitsandbytes does."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter(
            (layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False
        )
        self.scale, self.bias = scale, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class Wrapped(nn.Module):
    """A layer that hides its parameters."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = [layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer[0](x)


@torch.no_grad()
@pytest.mark.parametrize("kind, error", [(Stored, 0.05), (Wrapped, 1e-6)])
@pytest.mark.parametrize("factory", [blip_decoder, blip_itm])
def test_layers_of_any_other_kind_serve(factory, kind, error, small, images):
    torch.manual_seed(0)
    model = factory(**small).eval()
    expected = losses_and_outputs(model, images)[0]
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and "decoder.cls" not in path and path != "itm_head":
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, kind(layer))
    assert (losses_and_outputs(model, images)[0] - expected).norm() <= error * expected.norm()


@torch.no_grad()
def test_layers_replaced_or_hooked_after_quantisation_are_called(small, images):
    try:
        model = prepare(blip_decoder(**small), "int8", "cpu")
    except ImportError:
        pytest.skip("torch has no int8 kernels for this processor")
    search, called = dict(num_beams=2, max_length=8, min_length=5), []
    block = model.text_decoder.bert.encoder.layer[1].attention.self
    expected = model.generate(images, **search)
    hook = block.value.register_forward_hook(lambda *_: called.append("hook"))
    assert model.generate(images, **search) == expected and called
    hook.remove()
    called.clear()
    whole, block.query = block.query, nn.Sequential(block.query)
    block.query.register_forward_hook(lambda *_: called.append("replaced"))
    assert model.generate(images, **search) == expected and called
    block.query = whole
    called.clear()
    assert model.generate(images, **search) == expected and not called


def test_hooks_on_linear_layers_are_called(small, images, stacks):
    model, called = blip_decoder(**small).eval(), set()
    layers = {path: layer for path, layer in model.named_modules() if type(layer) is nn.Linear}
    for path, layer in layers.items():
        layer.register_forward_hook(lambda *_, path=path: called.add(path))
    model(images, TEXTS)
    assert called == set(layers)
