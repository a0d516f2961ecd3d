"""What the base model computes, counted: no clock, so the same on every machine.

A multiplication and an addition are two. Captions have 14 tokens, [CLS] and [SEP] included. Official BLIP's counts are
those of its code (fp32, padded texts), by the same counter.
"""

from __future__ import annotations

import pytest
import torch

from blipfast.models.blip import blip_decoder
from blipfast.models.blip_itm import blip_itm
from blipfast.models.blip_pretrain import blip_pretrain
from blipfast.models.blip_vqa import blip_vqa
from blipfast.models.packed import begin
from tests.flops import flop

CAPTION = " ".join(["dog"] * 12)


def gflop(run) -> float:
    return flop(run) / 1e9


@pytest.mark.slow
def test_a_pretraining_step_costs_at_most_205_gflop_a_sample():
    """Official: 306.6. Left: the two image encoders (35 forward each, one of them 70 backward), one K/V projection."""
    model, B = blip_pretrain(image_size=224), 2
    image, captions = torch.randn(B, 3, 224, 224), [CAPTION, CAPTION.replace("dog", "cat")]

    def step():
        sum(model(image, captions, 0.4)).backward()

    assert 150 < gflop(step) / B <= 205


def test_reranking_costs_at_most_2_9_gflop_a_pair():
    """Official: 24.06. An image meets 256 texts, which others have met; its keys and values are counted in."""
    with torch.device("meta"):
        model = blip_itm(image_size=384)
        image = torch.zeros(1, 3, 384, 384)
        states = model.visual_encoder(image)
    texts = begin(model.text_encoder, model.pack(model.encode_text([CAPTION] * 256)))

    @torch.no_grad()
    def rerank():
        model.match(model.image_states(states), texts.pick(range(256)), [0] * 256)

    assert 2 < gflop(rerank) / 256 <= 2.9


@pytest.mark.slow
def test_a_caption_costs_at_most_146_gflop():
    """Official: 910. 3 beams, 16 steps; 111 are the image encoder."""
    model = blip_decoder(image_size=384).eval()
    image = torch.randn(1, 3, 384, 384)
    limits = {"num_beams": 3, "max_length": 20, "min_length": 20}  # a prompt of 4, so 16 steps
    assert 120 < gflop(lambda: model.generate(image, **limits)) <= 146


@pytest.mark.slow
def test_ranking_128_answers_costs_at_most_265_gflop_a_question():
    """Official: 501.5. 184 are the image encoder, 26 its keys and values."""
    model = blip_vqa(image_size=480).eval()
    image, words = torch.randn(1, 3, 480, 480), "red blue green dog cat man woman tree house car".split()
    answers = words + [f"{a} {b}" for a in words for b in words] + [f"{a} and a {a}" for a in words] * 2
    assert len(answers) == 130

    @torch.no_grad()
    def rank():
        model(image, ["what is the colour of the dog"], answers, train=False, inference="rank", k_test=128)

    assert 200 < gflop(rank) <= 265
