"""Precisions of inference: close to fp32, and refused where they make no sense."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from blipfast.models.blip import blip_decoder
from blipfast.models.blip_itm import blip_itm
from blipfast.models.blip_vqa import blip_vqa
from blipfast.precision import dtype_of, fast_bf16
from blipfast.quantize import Int8Linear, prepare

TEXTS = ["a cat", "two red apples", "a dog on the beach", "the sea"]


@torch.no_grad()
@pytest.mark.parametrize("precision, error", [("fp32", 1e-6), ("bf16", 0.05), ("int8", 0.1), ("auto", 0.05)])
def test_matching_is_close_to_fp32_in_every_precision(small, images, precision, error):
    torch.manual_seed(0)
    model = blip_itm(embed_dim=8, **small).eval()
    expected = model(images, TEXTS, "itm"), model(images, TEXTS, "itc")
    model = prepare(copy.deepcopy(model), precision, "cpu")
    for head, theirs in zip(("itm", "itc"), expected):
        ours = model(images, TEXTS, head).float()
        assert (ours - theirs).norm() <= error * theirs.norm()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_captions_and_answers_are_made_in_low_precision(small, images, precision):
    captioner = prepare(blip_decoder(**small), precision, "cpu")
    assert len(captioner.generate(images, num_beams=2, max_length=8, min_length=5)) == 4
    answerer = prepare(blip_vqa(**small), precision, "cpu")
    for inference in ("rank", "generate"):
        with torch.no_grad():
            answers = answerer(images, TEXTS, ["a dog", "two"], train=False, inference=inference, k_test=2)
        assert len(answers) == 4


def test_int8_quantises_the_text_side_and_leaves_image_keys_and_values(small):
    model = prepare(blip_decoder(**small), "int8", "cpu")
    layer = model.text_decoder.bert.encoder.layer[0]
    assert isinstance(layer.attention.self.key, Int8Linear) and isinstance(layer.output.dense, Int8Linear)
    assert isinstance(model.text_decoder.cls.predictions.decoder, Int8Linear)
    assert type(layer.crossattention.self.key) is nn.Linear
    assert type(model.visual_encoder.blocks[0].mlp.fc1) is nn.Linear


def test_int8_rounds_a_weight_to_one_part_in_250_of_its_row():
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    x = torch.eye(64)
    difference = (Int8Linear(linear)(x) - linear(x)).abs().amax(0)
    assert (difference <= linear.weight.abs().amax(1) * 1.01 / 127).all()


def test_auto_is_bf16_where_that_is_fast():
    assert dtype_of("auto", "cpu") == (torch.bfloat16 if fast_bf16("cpu") else torch.float32)
    assert dtype_of("fp16", "cpu") == torch.float16


@pytest.mark.parametrize(
    "precision, device, message", [("fp8", "cpu", "fp8"), ("int8", "meta", "is for CPUs")]
)
def test_a_precision_that_makes_no_sense_is_refused(precision, device, message):
    with pytest.raises(ValueError, match=message):
        dtype_of(precision, device)
