"""Precisions of inference: close to fp32, and refused where they make no sense."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from blipfast import processor
from blipfast import quantize as module
from blipfast.config_checks import _CHOICES
from blipfast.models.blip import blip_decoder
from blipfast.models.blip_itm import blip_itm
from blipfast.models.blip_nlvr import blip_nlvr
from blipfast.models.blip_vqa import blip_vqa
from blipfast.models.vit import Mlp
from blipfast.precision import CHOICES, dtype_of, fast_bf16
from blipfast.quantize import (
    CHUNK,
    E4M3,
    Int8Linear,
    Int8Mlp,
    ScaledLinear,
    activation_steps,
    prepare,
    quantize,
)

TEXTS = ["a cat", "two red apples", "a dog on the beach", "the sea"]
LAYERS = {
    "int8": lambda linear: Int8Linear(linear.weight, linear.bias),
    "int8 of GPUs": lambda linear: ScaledLinear(linear, torch.int8),
    "fp8": lambda linear: ScaledLinear(linear, E4M3),
}
try:
    steps = activation_steps()
except ImportError:
    steps = 0
needs_int8 = pytest.mark.skipif(not steps, reason="torch has no int8 kernels for this processor")


@pytest.fixture(params=LAYERS)
def kind(request) -> str:
    if request.param == "int8" and not steps:
        pytest.skip("torch has no int8 kernels for this processor")
    return request.param


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 32)


@torch.no_grad()
@pytest.mark.parametrize(
    "precision, error",
    [("fp32", 1e-6), ("bf16", 0.05), pytest.param("int8", 0.1, marks=needs_int8), ("auto", 0.05)],
)
def test_matching_is_close_to_fp32_in_every_precision(small, images, precision, error):
    torch.manual_seed(0)
    model = blip_itm(embed_dim=8, **small).eval()
    expected = model(images, TEXTS, "itm"), model(images, TEXTS, "itc")
    model = prepare(copy.deepcopy(model), precision, "cpu")
    for head, theirs in zip(("itm", "itc"), expected):
        ours = model(images, TEXTS, head).float()
        assert (ours - theirs).norm() <= error * theirs.norm()


@torch.no_grad()
@pytest.mark.parametrize("precision, error", [("int8", 0.05), ("fp8", 0.1)])
def test_what_a_gpu_computes_is_close_to_fp32(small, images, precision, error):
    torch.manual_seed(0)
    model = blip_itm(embed_dim=8, **small).eval()
    low = quantize(copy.deepcopy(model), precision, "cuda").bfloat16()
    for head in ("itm", "itc"):
        theirs = model(images, TEXTS, head)
        assert 0 < (low(images.bfloat16(), TEXTS, head).float() - theirs).norm() <= error * theirs.norm()


@pytest.mark.parametrize("precision", ["bf16", pytest.param("int8", marks=needs_int8)])
def test_captions_and_answers_are_made_in_low_precision(small, images, precision):
    captioner = prepare(blip_decoder(**small), precision, "cpu")
    assert len(captioner.generate(images, num_beams=2, max_length=8, min_length=5)) == 4
    answerer = prepare(blip_vqa(**small), precision, "cpu")
    for inference in ("rank", "generate"):
        with torch.no_grad():
            answers = answerer(images, TEXTS, ["a dog", "two"], train=False, inference=inference, k_test=2)
        assert len(answers) == 4


@needs_int8
@pytest.mark.parametrize("amx", [True, False])
def test_int8_leaves_image_keys_and_values_and_with_amx_the_image_encoder(small, monkeypatch, amx):
    monkeypatch.setattr(processor, "_capabilities", lambda: {"amx_bf16": amx})
    model = prepare(blip_decoder(**small), "int8", "cpu")
    layer = model.text_decoder.bert.encoder.layer[0]
    assert isinstance(layer.attention.self.key, Int8Linear) and isinstance(layer.output.dense, Int8Linear)
    assert isinstance(model.text_decoder.cls.predictions.decoder, Int8Linear)
    assert type(layer.crossattention.self.key) is nn.Linear
    for block in model.visual_encoder.blocks:
        last = block is model.visual_encoder.blocks[-1]
        assert isinstance(block.attn.qkv, Int8Linear) == (not amx and not last)
        assert isinstance(block.attn.proj, Int8Linear) == (not amx)
        assert isinstance(block.mlp, Int8Mlp) == (not amx)


@needs_int8
@torch.no_grad()
def test_decoding_makes_queries_keys_and_values_by_one_layer(small, images):
    captioner = prepare(blip_decoder(**small), "int8", "cpu")
    blocks = [layer.attention.self for layer in captioner.text_decoder.bert.encoder.layer]
    x = torch.randn(3, 5, 48)
    for block in blocks:
        alone = [layer(x) for layer in (block.query, block.key, block.value)]
        assert torch.equal(block.joined(x), torch.cat(alone, -1))
    search = dict(num_beams=2, max_length=8, min_length=5)
    expected = captioner.generate(images, **search)
    for block in blocks:
        block.joined = None
    assert captioner.generate(images, **search) == expected


@needs_int8
@torch.no_grad()
def test_the_image_encoder_in_int8_is_close_to_fp32(small, images, monkeypatch):
    monkeypatch.setattr(processor, "_capabilities", dict)
    encoder = blip_decoder(**small).eval().visual_encoder
    low = quantize(nn.ModuleDict({"visual_encoder": copy.deepcopy(encoder)}))["visual_encoder"]
    for class_only in (False, True):
        expected = encoder(images, class_only=class_only)
        error = low(images, class_only=class_only) - expected
        assert 0 < error.norm() <= 0.05 * expected.norm()


@needs_int8
def test_an_int8_model_is_run_with_gradients_on_and_prepared_again(small, images, monkeypatch):
    monkeypatch.setattr(processor, "_capabilities", dict)
    torch.manual_seed(0)
    model = blip_decoder(**small).eval()
    expected = model(images, TEXTS)
    low = prepare(model, "int8", "cpu")
    loss = low(images, TEXTS)
    assert torch.allclose(loss, expected, rtol=0.01)
    assert torch.equal(prepare(low, "int8", "cpu")(images, TEXTS), loss)


@needs_int8
def test_a_feed_forward_in_int8_is_its_layers_one_after_the_other():
    torch.manual_seed(0)
    mlp, x = Mlp(64, 128), torch.randn(3, CHUNK, 64)
    fc1, fc2 = map(LAYERS["int8"], (mlp.fc1, mlp.fc2))
    expected = fc2(nn.functional.gelu(fc1(x)))
    assert torch.equal(Int8Mlp(mlp)(x), expected)


@pytest.mark.parametrize("precision, dtype", [("int8", torch.int8), ("fp8", E4M3)])
def test_on_a_gpu_the_wide_layers_of_many_rows_are_quantised(small, precision, dtype):
    for build, text in ((blip_decoder, None), (blip_vqa, "text_encoder"), (blip_nlvr, "text_encoder")):
        model = quantize(build(**small), precision, "cuda")
        found = {path for path, layer in model.named_modules() if isinstance(layer, ScaledLinear)}
        expected = {"visual_encoder.blocks.0.attn.qkv"}
        if text:
            expected |= {f"{text}.encoder.layer.{i}.intermediate.dense" for i in range(2)}
        assert found == expected
        assert all(model.get_submodule(path).dtype == dtype for path in found)


def test_layers_of_widths_a_gpu_cannot_take_stay(small):
    model = blip_vqa(**small | {"med_config": small["med_config"] | {"intermediate_size": 104}})
    quantize(model, "fp8", "cuda")
    assert type(model.text_encoder.encoder.layer[0].intermediate.dense) is nn.Linear


@needs_int8
def test_int8_rounds_a_weight_to_one_part_in_250_of_its_row(linear):
    x = torch.eye(64)
    difference = (LAYERS["int8"](linear)(x) - linear(x)).abs().amax(0)
    assert (difference <= linear.weight.abs().amax(1) * 1.01 / 127).all()


def test_products_are_those_of_the_rounded_numbers(linear, kind):
    def rounded(x: torch.Tensor, largest: int) -> torch.Tensor:
        scale = x.abs().amax(1, keepdim=True) / largest
        return (
            (x / scale).to(E4M3).double() * scale if kind == "fp8" else (x / scale).round().double() * scale
        )

    x = torch.randn(40, 64)
    largest = {"int8": steps, "int8 of GPUs": 127, "fp8": 448}[kind]
    expected = rounded(x, largest) @ rounded(linear.weight, 448 if kind == "fp8" else 127).t() + linear.bias
    error = (LAYERS[kind](linear)(x) - expected).abs().max()
    assert error <= (2**-8 * expected.abs().max() if kind == "fp8" else 1e-5)


def test_rows_do_not_depend_on_each_other(linear, kind):
    layer, x = LAYERS[kind](linear), torch.randn(CHUNK + 5, 64)
    alone = layer(x)
    x[0] *= 1e4
    assert torch.equal(layer(x)[1:], alone[1:])


@pytest.mark.parametrize(
    "shape", [(64,), (1, 64), (2, 3, 64), (16, 64), (17, 64), (0, 64), (2, CHUNK, 64), (CHUNK + 1, 64)]
)
def test_any_number_of_rows_is_served(linear, kind, shape):
    x = torch.randn(shape)
    y = LAYERS[kind](linear)(x.bfloat16())
    assert y.dtype == torch.bfloat16 and y.shape == (*shape[:-1], 32)
    assert torch.allclose(y.float(), linear(x), atol=0.1)


def test_strided_inputs_layers_without_bias_and_rows_of_zeros_are_served(kind):
    linear = nn.Linear(64, 32, bias=False).requires_grad_(False)
    linear.weight[3] = 0
    x = torch.randn(64, 5).t()
    x[2] = 0
    y = LAYERS[kind](linear)(x)
    assert torch.allclose(y, linear(x), atol=0.1) and not y[2].any() and not y[:, 3].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_hidden(linear, kind, bad):
    x = torch.randn(3, 64)
    x[1, 5] = bad
    y = LAYERS[kind](linear)(x)
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


def test_copies_casts_and_pickles_compute_the_same(linear, kind):
    layer, x = LAYERS[kind](linear), torch.randn(3, 64)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    assert torch.allclose(layer.bfloat16()(x), expected, atol=1e-3)


@needs_int8
def test_int8_stays_exact_enough_on_processors_that_add_in_16_bits():
    code = """if True:
        import torch
        from blipfast.quantize import Int8Linear, activation_steps
        torch.manual_seed(0)
        linear, x = torch.nn.Linear(256, 64), torch.rand(20, 256) + 1
        with torch.no_grad():
            low = Int8Linear(linear.weight, linear.bias)
            error = (low(x) - linear(x)).norm() / linear(x).norm()
        print(activation_steps(), float(error))
    """
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    steps, error = done.stdout.split()
    assert steps == "63" and float(error) < 0.03


@pytest.mark.parametrize(
    "capabilities, fast",
    [
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": True}, True),
        ({"avx2": True, "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_bf16_is_the_default_of_processors_that_multiply_it_fast(capabilities, fast, monkeypatch):
    monkeypatch.setattr(processor, "_capabilities", lambda: capabilities)
    assert fast_bf16("cpu") == fast
    assert dtype_of("auto", "cpu") == (torch.bfloat16 if fast else torch.float32)


def test_auto_is_bf16_where_that_is_fast():
    assert dtype_of("auto", "cpu") == (torch.bfloat16 if fast_bf16("cpu") else torch.float32)
    assert dtype_of("fp16", "cpu") == torch.float16


@pytest.mark.parametrize(
    "precision, device, message",
    [
        ("fp4", "cpu", "precision 'fp4' is unknown"),
        ("int8", "meta", "is for CPUs and NVIDIA's GPUs; on meta use bf16 or fp32"),
        ("fp8", "cpu", "is for NVIDIA's GPUs; on cpu use int8 or bf16"),
    ],
)
def test_a_precision_that_makes_no_sense_is_refused(precision, device, message):
    with pytest.raises(ValueError, match=message):
        dtype_of(precision, device)


def test_fp8_needs_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    for capability, serves in (((7, 0), ()), ((8, 0), ("int8",)), ((8, 9), ("int8", "fp8"))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, has=capability: has)
        for word in ("int8", "fp8"):
            if word in serves:
                assert dtype_of(word, "cuda") == torch.bfloat16
                continue
            instead = "bf16" if capability >= (8, 0) else "fp16"
            with pytest.raises(
                ValueError, match=f"this GPU has {capability[0]}.{capability[1]}; use {instead}"
            ):
                dtype_of(word, "cuda")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(ValueError, match="on an AMD GPU use bf16"):
        dtype_of("fp8", "cuda")


def test_int8_says_so_where_torch_has_no_kernels_for_the_processor(monkeypatch):
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    with pytest.raises(ImportError, match="does not have. Use precision bf16 or fp32"):
        activation_steps.__wrapped__()


def test_settings_and_the_command_line_know_the_same_precisions():
    assert set(_CHOICES["evaluate.precision"]) == set(CHOICES)
    with pytest.raises(ValueError, match="int8, fp8, got 'bf16'"):
        quantize(nn.Module(), "bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, needs", [(torch.int8, (7, 5)), (E4M3, (8, 9))])
@pytest.mark.parametrize("rows", [1, 17, 300])
def test_a_gpu_computes_what_the_cpu_does(dtype, needs, rows):
    if torch.cuda.get_device_capability() < needs:
        pytest.skip(f"needs compute capability {needs[0]}.{needs[1]}")
    torch.manual_seed(0)
    layer, x = ScaledLinear(nn.Linear(768, 2304), dtype).bfloat16(), torch.randn(rows, 768).bfloat16()
    q, scale = module.by_rows(x, dtype, module.LARGEST[dtype])
    weight = layer.weight_bits.view(dtype).float() * layer.scale_bits.view(torch.float32)[:, None]
    expected = nn.functional.linear(q.float() * scale, weight, layer.bias.float())
    assert torch.allclose(layer.cuda()(x.cuda()).float().cpu(), expected, atol=0.02, rtol=0.01)
