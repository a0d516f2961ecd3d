"""Grad-CAM: the heat is that of the formula, the words are the text's, and the model is left as it was."""

from __future__ import annotations

import argparse

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from blipfast.commands import explain as verb
from blipfast.explain import draw, grad_cam, image_grad_cam
from blipfast.models.blip_itm import blip_itm
from blipfast.text import train_tokenizer

from .run_folders import scramble, write_run

TEXT = "a dog's unbelievableness, red"


@pytest.fixture
def small(small):
    """Three layers: words have no heat in the last one."""
    return small | {"med_config": small["med_config"] | {"num_hidden_layers": 3}}


@pytest.fixture
def matcher(small):
    return scramble(blip_itm(embed_dim=8, **small), 0)


def by_hand(model, image, text, layer):
    """Heat of each token [T, 4, 4] by official BLIP's hooks: its names, a backward pass, the formula."""
    encoding = model.tokenizer(text, return_tensors="pt")
    encoding.input_ids[:, 0] = model.tokenizer.enc_token_id
    attend = model.text_encoder.encoder.layer[layer].crossattention.self
    attend.save_attention = True
    out = model.text_encoder(
        encoding.input_ids,
        attention_mask=encoding.attention_mask,
        encoder_hidden_states=model.visual_encoder(image[None]),
    )
    model.itm_head(out.last_hidden_state[:, 0])[:, 1].sum().backward()
    attend.save_attention = False
    heat = attend.get_attention_map() * attend.get_attn_gradients().clamp(0)
    model.zero_grad(set_to_none=True)
    return heat[0].mean(0)[:, 1:].reshape(-1, 4, 4).detach()


def test_heat_is_that_of_the_official_hooks(matcher, images):
    tokens = by_hand(matcher, images[0], TEXT, 1)
    heat = grad_cam(matcher, images[0], TEXT)
    assert heat.words == ["a", "dog", "'", "s", "unbelievableness", ",", "red"]
    pieces = len(tokens) - 2 - 6  # of the long word
    assert pieces > 1
    assert_close(heat.maps[1], tokens[2])
    assert_close(heat.maps[4], tokens[5 : 5 + pieces].mean(0))
    assert_close(heat.maps[6], tokens[-2])
    assert_close(heat.whole, tokens[1:-1].mean(0))
    assert heat.maps.min() >= 0 and heat.maps.max() > 0
    with torch.no_grad():
        assert heat.match == pytest.approx(matcher(images[:1], [TEXT]).softmax(1)[0, 1].item(), abs=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
def test_each_layer_has_its_own_heat(matcher, images, layer):
    assert_close(
        grad_cam(matcher, images[0], "a dog", layer).maps[1], by_hand(matcher, images[0], "a dog", layer)[2]
    )


def test_heat_of_an_image_block_is_that_of_register_blk(matcher, images):
    embeds = matcher.visual_encoder(images[:1], register_blk=1)
    ids = matcher.tokenizer("a dog", return_tensors="pt").input_ids
    ids[:, 0] = matcher.tokenizer.enc_token_id
    out = matcher.text_encoder(ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=embeds)
    matcher.itm_head(out.last_hidden_state[:, 0])[0, 1].backward()
    attend = matcher.visual_encoder.blocks[1].attn
    want = (attend.get_attention_map() * attend.get_attn_gradients().clamp(0))[0].mean(0)[0, 1:].view(4, 4)
    heat = image_grad_cam(matcher, images[0], "a dog")
    assert_close(heat.whole, want.detach())
    assert heat.words == [] and len(heat.maps) == 0


def test_the_model_is_left_as_it_was_and_may_be_frozen(matcher, images):
    free = grad_cam(matcher, images[0], "a dog")
    matcher.requires_grad_(False).train()
    with torch.inference_mode(False), torch.no_grad():
        assert_close(grad_cam(matcher, images[0], "a dog").maps, free.maps)
    assert matcher.training and all(parameter.grad is None for parameter in matcher.parameters())
    matcher.visual_encoder.eval()
    grad_cam(matcher, images[0], "a dog")
    assert matcher.training and matcher.text_encoder.training and not matcher.visual_encoder.training
    attend = matcher.text_encoder.encoder.layer[1].crossattention.self
    assert not attend.save_attention and attend.get_attention_map() is None


def test_compat_official_explains_the_cls_score(small, images):
    ours = scramble(blip_itm(embed_dim=8, **small), 0)
    official = scramble(blip_itm(embed_dim=8, compat="official", **small), 0)
    assert not torch.allclose(
        grad_cam(ours, images[0], "a dog").maps, grad_cam(official, images[0], "a dog").maps
    )


def test_a_bpe_tokenizer_gives_words_too(small, images):
    tokenizer = train_tokenizer(["a red dog", "a green apple"], 300)
    model = scramble(blip_itm(embed_dim=8, tokenizer=tokenizer, **small), 0)
    assert grad_cam(model, images[0], "a red zebra").words == ["a", "red", "zebra"]


def test_a_long_text_is_cut_where_itm_cuts_it(matcher, images):
    heat = grad_cam(matcher, images[0], "red " * 50)
    assert len(heat.words) == 33
    with torch.no_grad():
        assert heat.match == pytest.approx(
            matcher(images[:1], ["red " * 50]).softmax(1)[0, 1].item(), abs=1e-5
        )


@pytest.mark.parametrize(
    "text, layer, said", [("", None, "no words"), ("a", 2, "0 to 1 can be"), ("a", -1, "0 to 1 can be")]
)
def test_what_cannot_be_explained_is_said(matcher, images, text, layer, said):
    with pytest.raises(ValueError, match=said):
        grad_cam(matcher, images[0], text, layer)
    with pytest.raises(ValueError, match="one picture at a time"):
        grad_cam(matcher, images, "a")


def test_the_verb_writes_a_figure_of_every_word(small, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    model = scramble(blip_itm(embed_dim=8, **small), 0)
    run = write_run(tmp_path / "run", model, med_config=small["med_config"])
    Image.effect_noise((60, 40), 80).convert("RGBA").save(tmp_path / "x.png")
    parser = argparse.ArgumentParser()
    verb.add(parser.add_subparsers())

    def explain(*options):
        args = ["explain", "--model", run, tmp_path / "x.png", "A red dog!", "--device", "cpu", *options]
        args = parser.parse_args([str(arg) for arg in args])
        return args.run(args), capsys.readouterr().out.splitlines()

    code, out = explain("--out", tmp_path / "heat.png")
    assert code == 0 and out[0].startswith("match ")
    assert [line.split()[-1] for line in out[1:4]] == ["a", "red", "dog"]
    assert sum(float(line.split("%")[0]) for line in out[1:4]) == pytest.approx(100, abs=0.2)
    with Image.open(tmp_path / "heat.png") as figure:
        assert figure.size[0] > 1000
    assert explain("--out", tmp_path / "block.png", "--image-block", "0")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run", "x.png", "heat.png", "block.png"}
    with pytest.raises(ValueError, match="give one of them"):
        explain("--out", tmp_path / "no.png", "--image-block", "0", "--layer", "1")
    with pytest.raises(ValueError, match=r"heat: a figure's name ends in one of \.png"):
        explain("--out", tmp_path / "heat")


def test_a_text_with_dollars_is_no_formula(matcher, images, tmp_path):
    pytest.importorskip("matplotlib")
    picture = torch.zeros(3, 32, 32, dtype=torch.uint8)
    assert draw(
        picture, "$5^{ and $", grad_cam(matcher, images[0], "$5^{ and $"), tmp_path / "a.png"
    ).is_file()


def test_a_figure_without_matplotlib_says_what_to_install(matcher, images, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    heat = grad_cam(matcher, images[0], "a dog")
    with pytest.raises(ImportError, match=r"pip install 'blipfast\[plot\]'"):
        draw(torch.zeros(3, 8, 8, dtype=torch.uint8), "a dog", heat, tmp_path / "x.png")
