"""The reference against an implementation that is not ours: Hugging Face's BLIP, with the same random weights.

Differences that are known and set equal here: Hugging Face counts 8 text heads and a vision eps of 1e-5 by default,
never uses [ENC], does not smooth labels by default, and divides a beam's score by its generated length.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from blipfast.reference import BLIP_ITM, BLIP_VQA, BLIP_Decoder, Text, Tokens, lm_loss

transformers = pytest.importorskip("transformers")

TOKENS = Tokens(pad=0, cls=1, sep=2, mask=3, dec=4, enc=5)
BERT = {
    "vocab_size": 60,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VIT = {"width": 32, "depth": 2, "heads": 4, "patch_size": 8}
SMALL = {"vit": VIT, "image_size": 24, "bert": BERT, "tokens": TOKENS}


def to_hugging_face_key(key: str) -> str:
    """The name that Hugging Face gives to a parameter of official BLIP."""
    if not key.startswith("visual_encoder"):
        return key
    for pattern, name in [
        (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
        (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
        (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
        (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
        (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
        (r"\.attn\.proj\.", ".self_attn.projection."),
        (r"\.attn\.", ".self_attn."),
        (r"\.norm([12])\.", r".layer_norm\1."),
    ]:
        key = re.sub(pattern, name, key)
    return key


def scramble(model: nn.Module, seed: int, end: float) -> None:
    """Weights so large that attention and predictions are far from uniform; `end` favours the end token."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.2))
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.weight += 1
            if name.endswith("predictions"):
                module.bias[TOKENS.sep] += end


def pair(
    reference_class: type,
    hugging_face_name: str,
    seed: int,
    smoothing: float = 0.0,
    end: float = 3.0,
    **options,
):
    """A reference model and Hugging Face's with the same weights, both in eval mode."""
    width = 48 if reference_class is BLIP_VQA else VIT["width"]  # Hugging Face's VQA has one width for all
    vit = VIT | {"width": width}
    model = reference_class(**SMALL | {"vit": vit}, label_smoothing=smoothing, **options).eval()
    scramble(model, seed, end)
    text = {key: BERT[key] for key in BERT if "dropout" not in key} | {
        "label_smoothing": smoothing,
        "bos_token_id": TOKENS.dec,
        "pad_token_id": TOKENS.pad,
        "sep_token_id": TOKENS.sep,
        "eos_token_id": TOKENS.sep,
    }
    vision = {
        "hidden_size": vit["width"],
        "intermediate_size": 4 * vit["width"],
        "num_hidden_layers": vit["depth"],
        "num_attention_heads": vit["heads"],
        "patch_size": vit["patch_size"],
        "image_size": SMALL["image_size"],
        "layer_norm_eps": 1e-6,
    }
    config = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16)
    other = getattr(transformers, hugging_face_name)(config).eval()
    weights = {to_hugging_face_key(k): v for k, v in model.state_dict().items() if "position_ids" not in k}
    other.load_state_dict(weights)
    return model, other


def inputs(seed: int, batch: int = 3, length: int = 9) -> tuple[Tensor, Text]:
    """Pictures and right-padded texts of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, 3, SMALL["image_size"], SMALL["image_size"], generator=generator)
    ids = torch.randint(6, BERT["vocab_size"], (batch, length), generator=generator)
    lengths = length - torch.arange(batch) * 2
    ids[:, 0] = TOKENS.cls
    ids[torch.arange(batch), lengths - 1] = TOKENS.sep
    mask = (torch.arange(length) < lengths[:, None]).long()
    return image, Text(ids * mask, mask)


def assert_same_tokens(ours: Tensor, theirs: Tensor) -> None:
    """Equal sequences up to their end; what fills a row after it differs (Hugging Face takes pad 0 for none)."""

    def until_end(row: list[int]) -> list[int]:
        return row[: row.index(TOKENS.sep) + 1] if TOKENS.sep in row else row

    assert list(map(until_end, ours.tolist())) == list(map(until_end, theirs.tolist()))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_caption_logits_and_loss_equal_hugging_face(smoothing):
    model, other = pair(BLIP_Decoder, "BlipForConditionalGeneration", 0, smoothing, prompt_length=3)
    image, text = inputs(1)
    decoded = text.starting(TOKENS.dec)
    labels = decoded.ids.masked_fill(text.mask == 0, -100)
    labels[:, :3] = -100
    theirs = other(pixel_values=image, input_ids=decoded.ids, attention_mask=text.mask, labels=labels)
    real = text.mask.bool()
    assert_close(model.logits(image, text)[real], theirs.logits[real], rtol=1e-5, atol=1e-5)
    assert_close(model(image, text), theirs.loss, rtol=1e-5, atol=1e-6)


def test_caption_gradients_equal_hugging_face():
    model, other = pair(BLIP_Decoder, "BlipForConditionalGeneration", 2, 0.1, prompt_length=1)
    image, text = inputs(3)
    decoded = text.starting(TOKENS.dec)
    labels = decoded.ids.masked_fill(text.mask == 0, -100)
    model(image, text).backward()
    other(pixel_values=image, input_ids=decoded.ids, attention_mask=text.mask, labels=labels).loss.backward()
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = theirs[to_hugging_face_key(name)].grad
        scale = (
            1.0 if name.endswith("key.bias") else gradient.abs().max()
        )  # softmax cancels a key's bias: rounding
        assert_close(parameter.grad / scale, gradient / scale, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "num_beams, min_length, penalty", [(1, 6, 1.0), (3, 6, 1.0), (3, 0, 1.3), (5, 9, 1.0)]
)
def test_generated_captions_equal_hugging_face_token_for_token(seed, num_beams, min_length, penalty):
    check_captions(seed, num_beams, min_length, penalty)


@pytest.mark.parametrize("seed, num_beams", [(5, 2), (8, 3)])
def test_beam_search_stops_where_hugging_face_stops(seed, num_beams):
    """Seeds where it matters that the bound is the best beam still running, not the best candidate."""
    check_captions(seed, num_beams, 0, 1.0, end=4.0, batch=8)


def check_captions(seed, num_beams, min_length, penalty, end=3.0, batch=3):
    model, other = pair(BLIP_Decoder, "BlipForConditionalGeneration", seed, end=end)
    image, _ = inputs(seed + 10, batch, length=17)
    prompt = torch.tensor([[TOKENS.cls, 11, 12, 13][: 1 + seed % 4]] * batch)
    limits = {
        "max_length": 16,
        "min_length": min_length,
        "num_beams": num_beams,
        "repetition_penalty": penalty,
    }
    ours = model.generate(image, prompt, length_norm="generated", **limits)
    with_end = torch.cat([prompt, torch.full_like(prompt[:, :1], TOKENS.sep)], 1)  # they take the end off
    assert_same_tokens(ours, other.generate(pixel_values=image, input_ids=with_end, **limits))


def test_matching_logits_and_cosines_equal_hugging_face():
    model, other = pair(BLIP_ITM, "BlipForImageTextRetrieval", 4, embed_dim=16)
    image, text = inputs(5)
    arguments = {"pixel_values": image, "input_ids": text.ids, "attention_mask": text.mask}
    with torch.no_grad():
        itm = other(**arguments).itm_score
        assert_close(model(image, text, "itm", first=TOKENS.cls), itm, rtol=1e-5, atol=1e-5)
        itc = other(**arguments, use_itm_head=False).itm_score
        assert_close(model(image, text, "itc"), itc, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(image, text, "itm"), itm, atol=1e-2), "[ENC] must make a difference"


def test_answer_loss_equals_hugging_face():
    model, other = pair(BLIP_VQA, "BlipForQuestionAnswering", 6, 0.1)
    image, question = inputs(7)
    question = Text(question.ids, torch.ones_like(question.mask))  # their decoder (5.23) looks at padding
    answer = inputs(8, length=6)[1].starting(TOKENS.dec)
    labels = answer.ids.masked_fill(answer.mask == 0, -100)
    theirs = other(
        pixel_values=image,
        input_ids=question.ids,
        attention_mask=question.mask,
        decoder_input_ids=answer.ids,
        decoder_attention_mask=answer.mask,
        labels=labels,
    ).loss
    states = model.question_states(image, question, first=TOKENS.cls)
    logits = model.text_decoder(answer, states, question.mask)
    assert_close(lm_loss(logits, labels, 0.1), theirs, rtol=1e-5, atol=1e-6)
    sums = model.answer_losses(states, question.mask, answer)
    assert_close(sums.sum() / (labels[:, 1:] != -100).sum(), theirs, rtol=1e-5, atol=1e-6)


def test_padding_of_a_question_changes_nothing_for_the_answer():
    model = BLIP_VQA(**SMALL).eval()
    scramble(model, 9, end=3.0)
    image, question = inputs(10)
    states = model.question_states(image, question)
    answer = inputs(11, length=6)[1]
    losses = model.answer_losses(states, question.mask, answer)
    for b, length in enumerate(question.mask.sum(1)):
        alone = torch.tensor([b])
        short = model.answer_losses(states[alone, :length], question.mask[alone, :length], answer[alone])
        assert_close(losses[alone], short, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_generated_answers_equal_hugging_face_token_for_token(seed):
    model, other = pair(BLIP_VQA, "BlipForQuestionAnswering", seed + 20)
    image, question = inputs(seed + 30)
    limits = {"max_length": 10, "min_length": 1, "num_beams": 3}
    ours = model.generate(image, question, first=TOKENS.cls, length_norm="generated", **limits)
    theirs = other.generate(
        pixel_values=image, input_ids=question.ids, attention_mask=question.mask, **limits
    )
    assert_same_tokens(ours, theirs)
