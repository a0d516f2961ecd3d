"""Checkpoints to and from others: the same weights bit for bit, and the same answers."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from blipfast.commands import convert as verb
from blipfast.config import load_config, save_config
from blipfast.models.blip import blip_decoder
from blipfast.models.blip_itm import blip_itm
from blipfast.models.blip_nlvr import blip_nlvr
from blipfast.models.blip_pretrain import blip_pretrain
from blipfast.models.blip_vqa import blip_vqa
from blipfast.models.checkpoint import read_state_dict, save_weights
from blipfast.models.convert import convert
from blipfast.models.huggingface import hugging_face_state, read_tokenizer, to_hugging_face, to_official
from blipfast.models.load import load_captioner, load_matcher, load_nlvr, load_vqa, settings_of
from blipfast.text import train_tokenizer

from .conftest import VIT
from .run_folders import TEXTS, scramble, write_run

KEYS = json.loads(gzip.decompress((Path(__file__).parent / "data" / "blip_keys.json.gz").read_bytes()))
CLASSES = {
    "decoder": ("BlipForConditionalGeneration", "caption"),
    "itm": ("BlipForImageTextRetrieval", "retrieval"),
    "vqa": ("BlipForQuestionAnswering", "vqa"),
}


@pytest.fixture
def pretrain_run(small, tmp_path):
    model = scramble(blip_pretrain(queue_size=8, embed_dim=8, **small), 0)
    return write_run(tmp_path / "run", model)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def without_counters(state: dict) -> dict:
    return {key: value for key, value in state.items() if not key.endswith("position_ids")}


# ---- names


@pytest.mark.parametrize("name", KEYS)
def test_names_go_to_hugging_face_and_back(name):
    there = [to_hugging_face(key) for key in KEYS[name]]
    assert len(set(there)) == len(there)
    assert [to_official(key) for key in there] == list(KEYS[name])


@pytest.mark.parametrize("name", ["decoder_base", "decoder_large", "itm_base", "itm_large", "vqa_base"])
def test_names_and_shapes_are_those_of_the_class_in_transformers(name):
    transformers = pytest.importorskip("transformers")
    architecture, task = CLASSES[name.split("_")[0]]
    state = {key: torch.empty(shape, device="meta") for key, shape in KEYS[name].items()}
    ours = {to_hugging_face(key): value.shape for key, value in without_counters(state).items()}
    large = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    size = 480 if task == "vqa" else 384
    vision = dict(image_size=size, **(large if name.endswith("large") else {}))
    with torch.device("meta"):
        model = getattr(transformers, architecture)(transformers.BlipConfig(vision_config=vision))
    assert {key: value.shape for key, value in model.state_dict().items()} == ours


def test_vqa_with_a_large_vit_has_no_class_in_transformers_and_is_refused():
    state = {key: torch.empty(shape, device="meta") for key, shape in KEYS["vqa_large"].items()}
    with pytest.raises(ValueError, match="no BlipForQuestionAnswering whose image encoder is 1024 wide"):
        hugging_face_state(state, "vqa")


# ---- there and back


@pytest.mark.parametrize("task", ["caption", "retrieval", "vqa"])
def test_official_to_hugging_face_and_back_is_bitwise_equal(pretrain_run, tmp_path, task):
    official, folder, again = tmp_path / "a.pth", tmp_path / "hf", tmp_path / "b.pth"
    convert(pretrain_run, "official", official, task)
    convert(pretrain_run, "huggingface", folder, task)
    convert(folder, "official", again)
    assert same(read_state_dict(official), read_state_dict(again))
    convert(folder, "safetensors", tmp_path / "c.safetensors")
    assert same(read_state_dict(official), read_state_dict(tmp_path / "c.safetensors"))
    assert any(key.endswith("position_ids") for key in torch.load(again, weights_only=True)["model"])
    assert {path.name for path in tmp_path.iterdir()} == {"run", "a.pth", "b.pth", "c.safetensors", "hf"}


def test_outputs_are_equal_after_the_round_trip(pretrain_run, small, images, tmp_path):
    official = tmp_path / "official.pth"
    convert(pretrain_run, "official", official)
    folders = {task: tmp_path / task for task in ("caption", "retrieval", "vqa")}
    for task, folder in folders.items():
        convert(pretrain_run, "huggingface", folder, task)
    with torch.no_grad():
        captions = blip_decoder(pretrained=str(official), **small).eval().generate(images, max_length=12)
        assert load_captioner(folders["caption"]).generate(images, max_length=12) == captions
        assert len(set(captions)) > 1
        matcher = blip_itm(pretrained=str(official), embed_dim=8, **small).eval()
        again = load_matcher(folders["retrieval"])
        for head in ("itm", "itc"):
            scores = matcher(images[:3], TEXTS, match_head=head)
            assert_close(again(images[:3], TEXTS, match_head=head), scores, rtol=0, atol=1e-5)
        assert load_matcher(folders["retrieval"], compat="official").compat == "official"


def test_answers_are_equal_after_the_round_trip(small, images, tmp_path):
    vit = dict(VIT, width=48)  # transformers gives encoder and decoder one width
    model = scramble(blip_vqa(**small | {"vit": vit}), 1)
    run = write_run(tmp_path / "run", model, vit=vit)
    convert(run, "huggingface", tmp_path / "hf")
    again = load_vqa(tmp_path / "hf")
    assert same(model.state_dict(), again.state_dict())
    with torch.no_grad():
        for how in (
            {"inference": "generate"},
            {"inference": "rank", "answer": ["yes", "no", "a dog"], "k_test": 3},
        ):
            ours, theirs = (
                model(images[:3], TEXTS, train=False, **how),
                again(images[:3], TEXTS, train=False, **how),
            )
            assert list(ours) == list(theirs)


@pytest.mark.slow
def test_a_checkpoint_of_base_size_makes_the_round_trip(images, tmp_path):
    """All 224 million weights of a captioner in the true format; pictures of 32 pixels, to be quick."""
    official = save_weights(blip_decoder(vit="base", image_size=32).state_dict(), tmp_path / "model.pth")
    convert(official, "huggingface", tmp_path / "hf")
    convert(tmp_path / "hf", "official", tmp_path / "again.pth")
    first = read_state_dict(official)
    assert same(first, read_state_dict(tmp_path / "again.pth")) and len(first) == 474
    captions = load_captioner(official).generate(images, max_length=8, min_length=6)
    assert load_captioner(tmp_path / "hf").generate(images, max_length=8, min_length=6) == captions


# ---- tokenizers and folders of others


def test_a_bpe_tokenizer_and_another_size_survive(small, images, tmp_path):
    tokenizer = train_tokenizer(["a red dog", "a green apple", "a blue car"], 300)
    model = scramble(blip_itm(embed_dim=8, tokenizer=tokenizer, **small), 4)
    convert(write_run(tmp_path / "run", model), "huggingface", tmp_path / "hf")
    again = load_matcher(tmp_path / "hf")
    assert again.tokenizer("a red dog").input_ids == tokenizer("a red dog").input_ids
    assert again.tokenizer.enc_token_id == tokenizer.enc_token_id
    assert_close(again(images[:3], ["a red dog"] * 3), model(images[:3], ["a red dog"] * 3))
    assert not (tmp_path / "hf" / "vocab.txt").exists()


def test_an_old_folder_with_a_bin_file_and_plain_berts_tokenizer_loads(pretrain_run, images, tmp_path):
    folder = tmp_path / "hf"
    convert(pretrain_run, "huggingface", folder, "caption")
    captions = load_captioner(folder).generate(images, max_length=10)
    from safetensors.torch import load_file

    old = load_file(folder / "model.safetensors")
    old["text_decoder.bert.embeddings.position_ids"] = torch.arange(64)[None]
    old["text_decoder.cls.predictions.decoder.bias"] = old.pop("text_decoder.cls.predictions.bias")
    torch.save(old, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    words = (folder / "vocab.txt").read_text().splitlines()
    (folder / "vocab.txt").write_text("\n".join(words[:30522]) + "\n")
    assert load_captioner(folder).generate(images, max_length=10) == captions
    (folder / "vocab.txt").write_text("\n".join(words[:30521][::-1]) + "\n")
    with pytest.raises(ValueError, match="vocab.txt: not the vocabulary of bert-base-uncased"):
        load_captioner(folder)


def test_a_folder_in_shards_loads_and_a_lost_shard_is_named(pretrain_run, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "hf"
    convert(pretrain_run, "huggingface", folder, "caption")
    whole = read_state_dict(folder)
    state = load_file(folder / "model.safetensors")
    names = {key: f"part{i % 2}.safetensors" for i, key in enumerate(state)}
    for part in set(names.values()):
        save_file({key: state[key] for key in state if names[key] == part}, folder / part)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert same(read_state_dict(folder), whole)
    (folder / "part1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="part1.safetensors"):
        read_state_dict(folder)


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(pretrain_run, tmp_path):
    convert(pretrain_run, "huggingface", tmp_path / "hf", "caption")
    with pytest.raises(ValueError, match="30524 tokens, but the model embeds 500"):
        read_tokenizer(tmp_path / "hf", 500)


# ---- NLVR2


def test_nlvr_goes_to_official_and_back_but_not_to_hugging_face(small, images, tmp_path):
    model = scramble(blip_nlvr(**small), 6)
    run = write_run(tmp_path / "run", model)
    convert(run, "official", tmp_path / "nlvr.pth")
    assert same(read_state_dict(tmp_path / "nlvr.pth"), model.state_dict())
    with torch.no_grad():
        again = load_nlvr(run)
        assert_close(again(images, TEXTS[:2], None, train=False), model(images, TEXTS[:2], None, train=False))
    with pytest.raises(ValueError, match="transformers has no BLIP class for nlvr"):
        convert(run, "huggingface", tmp_path / "hf")


# ---- what is refused


@pytest.mark.parametrize(
    "to, name, task, said",
    [
        (
            "huggingface",
            "hf",
            None,
            "holds a pretrain model; say which part: --task caption, retrieval or vqa",
        ),
        ("huggingface", "run", "caption", "exists and is not empty"),
        ("official", "x.safetensors", None, "--to official writes a file ending in .pth"),
        ("safetensors", "x", None, "--to safetensors writes a file ending in .safetensors"),
        ("official", "x.pth", "nlvr", "holds a pretrain model, without cls_head"),
    ],
)
def test_what_cannot_be_converted_is_said_and_nothing_is_written(
    pretrain_run, tmp_path, to, name, task, said
):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=said):
        convert(pretrain_run, to, tmp_path / name, task)
    assert sorted(tmp_path.rglob("*")) == before


def test_another_kind_of_model_and_a_truncated_one_are_refused(pretrain_run, tmp_path):
    clip = save_weights(
        {"logit_scale": torch.ones(1), "visual.proj": torch.ones(2, 2)}, tmp_path / "clip.pth"
    )
    with pytest.raises(ValueError, match=r"clip.pth: holds no BLIP model"):
        convert(clip, "official", tmp_path / "x.pth")
    weights = pretrain_run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable checkpoint"):
        convert(pretrain_run, "huggingface", tmp_path / "hf", "caption")
    assert not (tmp_path / "hf").exists() and not (tmp_path / "x.pth").exists()


def test_a_small_checkpoint_alone_does_not_say_how_many_heads_it_has(pretrain_run, tmp_path):
    convert(pretrain_run, "official", tmp_path / "small.pth")
    with pytest.raises(ValueError, match="loaded from its run folder or Hugging Face folder"):
        convert(tmp_path / "small.pth", "huggingface", tmp_path / "hf", "caption")


def test_a_full_disk_leaves_no_half_folder(pretrain_run, tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blipfast.models.huggingface.write_tokenizer", full_disk)
    with pytest.raises(OSError, match="No space"):
        convert(pretrain_run, "huggingface", tmp_path / "hf", "caption")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_hugging_face_folder_keeps_how_its_run_is_used(pretrain_run, tmp_path):
    config = load_config(pretrain_run / "config.yaml")
    config.data.prompt, config.data.clean_captions = "", False
    config.evaluate.num_beams, config.evaluate.max_length, config.evaluate.min_length = 2, 9, 1
    save_config(config, pretrain_run / "config.yaml")
    convert(pretrain_run, "huggingface", tmp_path / "hf", "caption")
    kept = settings_of(tmp_path / "hf")
    assert (kept.data.prompt, kept.data.clean_captions, load_captioner(tmp_path / "hf").prompt) == (
        "",
        False,
        "",
    )
    assert (kept.evaluate.num_beams, kept.evaluate.max_length, kept.evaluate.min_length) == (2, 9, 1)
    theirs = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert (theirs["num_beams"], theirs["max_length"], theirs["min_length"]) == (2, 9, 1)
    assert "max_length=9" in (tmp_path / "hf" / "README.md").read_text()
    convert(tmp_path / "hf", "safetensors", tmp_path / "plain.safetensors")
    convert(tmp_path / "plain.safetensors", "official", tmp_path / "again.pth")
    said = convert(pretrain_run, "safetensors", tmp_path / "plain.safetensors")
    assert "its captions begin with '', to be given as --prompt" in said


def test_a_vqa_model_is_no_captioner(small, tmp_path):
    run = write_run(tmp_path / "vqa", scramble(blip_vqa(**small), 0))
    with pytest.raises(ValueError, match="holds a VQA model, whose decoder answers questions"):
        load_captioner(run)


def test_the_verb_converts_and_says_what_it_wrote(pretrain_run, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    verb.add(parser.add_subparsers())
    output = tmp_path / "hf"
    args = ["convert", str(pretrain_run), "--to", "huggingface", "--task", "vqa", "--output", str(output)]
    args = parser.parse_args(args)
    assert args.run(args) == 0
    assert "BlipForQuestionAnswering" in capsys.readouterr().out
    assert "BlipForQuestionAnswering" in (output / "README.md").read_text()
