"""The two ways in which a decoder looks at images, and linear layers of few rows."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from blipfast import processor
from blipfast.models import generation
from blipfast.models import image_memory as image_memory_module
from blipfast.models.blip import blip_decoder
from blipfast.models.generation import generate
from blipfast.models.image_memory import KeysValues, Tokens, image_memory
from blipfast.models.packed import image_states
from blipfast.ops import linear as linear_op
from blipfast.ops.linear import is_plain, linear
from blipfast.text import train_tokenizer
from tests.flops import flop

TOKENIZER = train_tokenizer(["a picture of a dog", "two red apples"], vocab_size=270)
PROMPT = torch.tensor([TOKENIZER.bos_token_id, 20, 21])
RULES = dict(eos_token_id=TOKENIZER.sep_token_id, pad_token_id=TOKENIZER.pad_token_id, min_length=0)


@pytest.fixture
def decoder(small):
    """With weights and biases so large that what is said depends on the picture."""
    torch.manual_seed(0)
    small["med_config"]["initializer_range"] = 0.3
    decoder = blip_decoder(tokenizer=TOKENIZER, **small).eval().text_decoder
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("bias"):
                parameter += 0.3 * torch.randn_like(parameter)
        decoder.cls.predictions.bias[TOKENIZER.sep_token_id] += 4.0
    return decoder


@pytest.fixture
def embeds():
    return torch.randn(7, 17, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask():
    mask = torch.rand(7, 17, generator=torch.Generator().manual_seed(2)) > 0.3
    mask[:, 0] = True
    return mask


def as_keys(encoder, embeds, mask, rows):
    return KeysValues(image_states(encoder, embeds, mask))


def as_tokens(encoder, embeds, mask, rows):
    return Tokens(embeds, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_image_tokens_as_they_are_give_the_context_of_keys_and_values(decoder, embeds, mask, masked, dtype):
    """In bf16 either way may be as far from the truth as the other, twice at most."""
    mask = mask if masked else None
    x, here = torch.randn(3, 5, 48), slice(2, 5)

    def context(way, i, dtype):
        encoder = copy.deepcopy(decoder.bert.encoder).to(dtype)
        memory, block = way(encoder, embeds.to(dtype), mask, 0), encoder.layer[i].crossattention.self
        return memory.context(i, block, x.to(dtype), here).float()

    for i in range(len(decoder.bert.encoder.layer)):
        truth = context(as_keys, i, torch.float32)
        ours, theirs = (context(way, i, dtype) - truth for way in (as_tokens, as_keys))
        assert ours.abs().max() <= 2 * theirs.abs().max() + 1e-5
        assert truth.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_images_one_by_one_give_the_context_of_all_at_once(decoder, embeds, mask, masked, monkeypatch):
    """As oneDNN multiplies in fp32, and as MKL does."""
    found = []
    for wins in (False, True):
        monkeypatch.setattr(image_memory_module, "onednn_wins", lambda rows, numbers, wins=wins: wins)
        memory = as_tokens(decoder.bert.encoder, embeds, mask if masked else None, 0)
        block = decoder.bert.encoder.layer[1].crossattention.self
        torch.manual_seed(0)
        found.append(memory.context(1, block, torch.randn(3, 5, 48), slice(2, 5)))
    assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 1}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_texts_are_the_same_both_ways(decoder, embeds, mask, how, masked, monkeypatch):
    texts = []
    for way in (as_keys, as_tokens):
        monkeypatch.setattr(generation, "image_memory", way)
        options = RULES | how | {"image_mask": mask if masked else None, "max_length": 12}
        texts.append(generate(decoder, PROMPT, embeds, batch_size=3, **options))
    assert torch.equal(*texts)
    assert len({tuple(row) for row in texts[0].tolist()}) > 3, "the test needs texts that depend on the image"


def test_the_way_that_computes_less_is_chosen(decoder, monkeypatch):
    chosen = set()
    # tokens of an image, beams, length
    for N, beams, length in [(200, 1, 6), (200, 2, 7), (200, 3, 20), (200, 5, 20), (4, 1, 9), (40, 1, 4)]:
        embeds, cost = torch.randn(2, N, 32), {}
        rules = RULES | {"num_beams": beams, "max_length": length, "min_length": length}
        for way in (image_memory, as_keys, as_tokens):
            monkeypatch.setattr(generation, "image_memory", way)
            cost[way] = flop(lambda e=embeds, r=rules: generate(decoder, PROMPT, e, **r))
        assert cost[image_memory] == min(cost.values()), (N, beams, length)
        chosen.add(cost[image_memory] == cost[as_tokens])
    assert chosen == {True, False}


@pytest.mark.parametrize("way", [as_keys, as_tokens, image_memory])
def test_states_and_mask_of_the_caller_are_not_overwritten(decoder, embeds, mask, way, monkeypatch):
    """Images that wait take the places of those that have ended, in copies."""
    monkeypatch.setattr(generation, "image_memory", way)
    before = embeds.clone(), mask.clone()
    generate(decoder, PROMPT, embeds, image_mask=mask, batch_size=2, num_beams=2, max_length=9, **RULES)
    assert torch.equal(embeds, before[0]) and torch.equal(mask, before[1])


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("size", [1, 10**6])  # below and above a layer's
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4, 12, 65, 128, 129])
@torch.no_grad()
def test_a_linear_layer_of_linear_op_gives_the_same(rows, dtype, size, gelu, monkeypatch):
    monkeypatch.setattr(linear_op, "ONEDNN_SIZE", size)
    layer, x = nn.Linear(24, 40).to(dtype), torch.randn(rows, 1, 24).to(dtype)
    y, expected = linear(layer, x, gelu), F.gelu(layer(x)) if gelu else layer(x)
    assert y.shape == expected.shape and y.is_contiguous() and y.dtype == dtype
    assert_close(y, expected, **({"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}))


@pytest.mark.parametrize(
    "cpu, rows, dtype, onednn, left",
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, 1, torch.float32, True, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, 12, torch.bfloat16, False, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "amx_bf16": True}, 1, torch.float32, False, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "amx_bf16": True}, 12, torch.float32, True, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "amx_bf16": True}, 12, torch.bfloat16, False, True),
        ({}, 12, torch.bfloat16, False, False),
    ],
)
@torch.no_grad()
def test_the_processor_decides_who_multiplies_linear_op(cpu, rows, dtype, onednn, left, monkeypatch):
    monkeypatch.setattr(processor, "_capabilities", lambda: cpu)
    monkeypatch.setattr(linear_op, "ONEDNN_SIZE", 1)
    called = []
    monkeypatch.setattr(linear_op, "_onednn", lambda x, *rest: called.append("onednn") or x)
    monkeypatch.setattr(
        torch, "addmm", lambda b, *rest, addmm=torch.addmm: called.append("left") or addmm(b, *rest)
    )
    linear(nn.Linear(24, 40).to(dtype), torch.randn(rows, 24).to(dtype))
    assert called == ["onednn"] * onednn + ["left"] * left


@pytest.mark.parametrize(
    "cpu, shape, dtype, sizes",
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, (1, 577), torch.float32, [584]),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, (577,), torch.bfloat16, [584]),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, (17, 53), torch.bfloat16, [904]),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, (580,), torch.bfloat16, [580]),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, (197,), torch.bfloat16, [197]),
        (
            {"cpu_name": "Intel(R) Xeon(R)", "amx_bf16": True, "avx512_bf16": True},
            (577,),
            torch.bfloat16,
            [577],
        ),
    ],
)
@torch.no_grad()
def test_a_pictures_tokens_are_multiplied_with_rows_of_zeros(cpu, shape, dtype, sizes, monkeypatch):
    monkeypatch.setattr(processor, "_capabilities", lambda: cpu)
    layer, x, seen = nn.Linear(24, 40).to(dtype), torch.randn(*shape, 24).to(dtype), []

    def counted(multiply):
        return lambda x, *rest: seen.append(x.shape[:-1].numel()) or multiply(x, *rest)

    if linear_op._onednn is None:
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(linear_op, "_onednn", counted(linear_op._onednn))
    monkeypatch.setattr(F, "linear", counted(F.linear))
    y = linear(layer, x, gelu=True)
    assert seen == sizes and y.shape == (*shape, 40)
    monkeypatch.undo()
    assert_close(y, F.gelu(layer(x)), **({"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}))


@torch.no_grad()
def test_without_onednn_a_linear_layer_of_linear_op_gives_the_same(monkeypatch):
    monkeypatch.setattr(linear_op, "ONEDNN_SIZE", 1)
    layer, x = nn.Linear(24, 40), torch.randn(12, 24)
    y = linear(layer, x)
    monkeypatch.setattr(linear_op, "_onednn", None)
    assert_close(linear(layer, x), y)


def test_layers_that_are_not_plain_are_called_as_they_are():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = Doubled(4, 4), torch.randn(12, 4)
    assert torch.equal(linear(layer, x), layer(x))
    hooked, seen = nn.Linear(4, 4), []
    hooked.register_forward_hook(lambda layer, args, y: seen.append(y))
    assert linear(hooked, x) is seen[0]
    learned = nn.Linear(4, 4)
    learned.register_full_backward_hook(lambda layer, inputs, outputs: seen.append("backward"))
    linear(learned, x).sum().backward()
    assert seen[-1] == "backward"


def test_hooks_of_zero_3_do_not_keep_a_layer_from_being_plain():
    layer, called = nn.Linear(4, 4), []
    assert is_plain(layer, layer) and not is_plain(layer, nn.Sequential(layer))
    layer.register_forward_pre_hook(lambda *_: called.append(1))
    assert not is_plain(layer)
    layer.weight.ds_id = 0
    linear(layer, torch.randn(2, 4))
    assert is_plain(layer) and called


def test_a_linear_layer_has_gradients(monkeypatch):
    monkeypatch.setattr(linear_op, "onednn_wins", lambda rows, numbers: True)  # which has none
    layer, x = nn.Linear(4, 4), torch.randn(12, 4, requires_grad=True)
    gradients = [
        torch.autograd.grad(y.square().sum(), [x, layer.weight])
        for y in (linear(layer, x, gelu=True), F.gelu(layer(x)))
    ]
    for got, want in zip(*gradients, strict=True):
        assert_close(got, want)
