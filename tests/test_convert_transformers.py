"""Converted checkpoints in transformers, and its own folders here: the same answers, token for token."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from blipfast.data.transforms import eval_transform
from blipfast.models.blip_pretrain import blip_pretrain
from blipfast.models.blip_vqa import blip_vqa
from blipfast.models.convert import convert
from blipfast.models.load import load_captioner, load_matcher, load_vqa

from .conftest import VIT
from .run_folders import TEXTS, scramble, write_run

transformers = pytest.importorskip("transformers")


@pytest.fixture
def pretrain_run(small, tmp_path):
    model = scramble(blip_pretrain(queue_size=8, embed_dim=8, **small), 0)
    return write_run(tmp_path / "run", model)


def test_transformers_captions_token_for_token(pretrain_run, images, tmp_path):
    convert(pretrain_run, "huggingface", tmp_path / "hf", "caption")
    model, loading = transformers.BlipForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.vision_model.post_layernorm.eps == 1e-6 and model.config.text_config.num_attention_heads == 4
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = tokenizer(["a picture of"] * len(images), return_tensors="pt").input_ids
    ids = model.eval().generate(
        pixel_values=images, input_ids=prompt, num_beams=3, max_length=16, min_length=5
    )
    theirs = [text[len("a picture of ") :] for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    ours = load_captioner(tmp_path / "hf").generate(
        images, max_length=16, min_length=5, length_norm="generated"
    )
    assert ours == theirs and len(set(ours)) > 1
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (settings.num_beams, settings.max_length, settings.eos_token_id) == (3, 20, 102)


def test_transformers_matches_equally_with_cls_and_with_enc(pretrain_run, images, tmp_path):
    convert(pretrain_run, "huggingface", tmp_path / "hf", "retrieval")
    model = transformers.BlipForImageTextRetrieval.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert (text.input_ids[:, 0] == 101).all()
    inputs = dict(pixel_values=images[:3], attention_mask=text.attention_mask)
    official, ours = load_matcher(tmp_path / "hf", compat="official"), load_matcher(tmp_path / "hf")
    with torch.no_grad():
        itc = model(input_ids=text.input_ids, use_itm_head=False, **inputs).itm_score
        assert_close(ours(images[:3], TEXTS, match_head="itc"), itc, rtol=0, atol=1e-5)
        itm = model(input_ids=text.input_ids, **inputs).itm_score
        assert_close(official(images[:3], TEXTS, match_head="itm"), itm, rtol=0, atol=2e-5)
        text.input_ids[:, 0] = tokenizer.convert_tokens_to_ids("[ENC]")
        itm = model(input_ids=text.input_ids, **inputs).itm_score
        assert_close(ours(images[:3], TEXTS, match_head="itm"), itm, rtol=0, atol=2e-5)


def test_transformers_answers_token_for_token_with_the_folders_own_tokenizer(small, images, tmp_path):
    vit = dict(VIT, width=48)  # transformers gives encoder and decoder one width
    run = write_run(tmp_path / "run", scramble(blip_vqa(**small | {"vit": vit}), 3), vit=vit)
    convert(run, "huggingface", tmp_path / "hf")
    model = transformers.BlipForQuestionAnswering.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert (text.input_ids[:, 0] == 30523).all(), "questions begin with [ENC], as official BLIP's"
    ids = model.generate(
        input_ids=text.input_ids,
        attention_mask=text.attention_mask,
        pixel_values=images[:3],
        num_beams=3,
        max_length=10,
        min_length=1,
    )
    theirs = tokenizer.batch_decode(ids, skip_special_tokens=True)
    ours = load_vqa(tmp_path / "hf")(images[:3], TEXTS, train=False, inference="generate")
    assert ours == theirs


def test_the_processor_prepares_pictures_and_texts_as_official_blip(pretrain_run, tmp_path):
    convert(pretrain_run, "huggingface", tmp_path / "hf", "caption")
    processor = transformers.BlipProcessor.from_pretrained(tmp_path / "hf")
    noise = torch.randint(0, 256, (50, 70, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy())
    out = processor(images=picture, text="a dog's tail", return_tensors="pt")
    assert out.input_ids.tolist() == [[101, 1037, 3899, 1005, 1055, 5725, 102]]
    assert "token_type_ids" not in out
    ours = eval_transform(32, exact=True)(picture)
    assert_close(out.pixel_values[0], ours, rtol=0, atol=0.02)  # their resizing may be torchvision's


def test_a_folder_of_transformers_is_read_as_transformers_reads_it(images, tmp_path):
    """8 heads and eps 1e-5 where config.json leaves them out."""
    text = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=96, max_position_embeddings=64)
    vision = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    vision |= dict(patch_size=8, image_size=32)
    torch.manual_seed(0)
    config = transformers.BlipConfig(text_config=text, vision_config=vision)
    theirs = scramble(transformers.BlipForImageTextRetrieval(config), 5)
    theirs.save_pretrained(tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["text_config"].pop("num_attention_heads") == 8  # older ones leave defaults out
    assert written["vision_config"].pop("layer_norm_eps") == 1e-5
    (tmp_path / "hf" / "config.json").write_text(json.dumps(written))
    ours = load_matcher(tmp_path / "hf", compat="official")
    assert ours.text_encoder.config.num_attention_heads == 8 and ours.visual_encoder.norm.eps == 1e-5
    text = ours.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        itm = theirs(
            pixel_values=images[:3], input_ids=text.input_ids, attention_mask=text.attention_mask
        ).itm_score
        assert_close(ours(images[:3], TEXTS), itm, rtol=0, atol=2e-5)
    said = convert(tmp_path / "hf", "official", tmp_path / "x.pth")
    assert "layer_norm_eps 1e-05" in said and "8 text heads" in said
