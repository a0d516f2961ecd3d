"""Features: those of official BLIP_Base, ITC's vectors beside them, and what the verb writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from blipfast import cli
from blipfast.config import Config, save_config
from blipfast.data.images import load_image
from blipfast.data.transforms import eval_transform
from blipfast.models.blip_pretrain import BLIP_Pretrain
from blipfast.models.blip_vqa import BLIP_VQA
from blipfast.models.checkpoint import save_weights
from blipfast.models.load import load_features, load_matcher
from blipfast.tasks.features import FeatureExtractor
from blipfast.text import train_tokenizer

TEXTS = ["a red dog", "green", "a very blue car on the road"]


def save(folder, model, tokenizer, small):
    config = Config()
    config.model.vit, config.model.med_config = small["vit"], small["med_config"]
    config.model.image_size, config.model.embed_dim = 32, 8
    save_config(config, folder / "config.yaml")
    tokenizer.save(folder / "tokenizer.json")
    save_weights(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def run(small, tmp_path):
    """A pre-trained model's run folder."""
    torch.manual_seed(0)
    (tmp_path / "run").mkdir()
    tokenizer = train_tokenizer(TEXTS, 300)
    model = BLIP_Pretrain(**small, embed_dim=8, queue_size=4, tokenizer=tokenizer)
    return save(tmp_path / "run", model, tokenizer, small)


@pytest.fixture
def pictures(tmp_path):
    for name, colour in (("red", "red"), ("green", "green"), ("blue", "blue")):
        Image.new("RGB", (20, 30), colour).save(tmp_path / f"{name}.png")
    return [str(tmp_path / f"{name}.png") for name in ("red", "green", "blue")]


def blipfast(capsys, *args):
    code = cli.main(["features", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def pixels(pictures):
    return torch.stack([eval_transform(32)(load_image(path)) for path in pictures])


def close(one, other):
    torch.testing.assert_close(torch.as_tensor(one), other, rtol=1e-4, atol=1e-5)


def test_states_are_those_of_official_blip_base_one_picture_and_text_at_a_time(run, images):
    extractor, official = FeatureExtractor(run), load_features(run)
    found = extractor.image(images[:3], tokens=True)
    texts = extractor.text(TEXTS, tokens=True)
    both = extractor.multimodal(images[:3], TEXTS, tokens=True)
    with torch.no_grad():
        close(found["image_tokens"], official(images[:3], None, "image"))
        close(found["image_embeds"], official(images[:3], None, "image")[:, 0])
        start = 0
        for i, text in enumerate(TEXTS):
            states = official(None, [text], "text")[0]
            seen = official(images[i : i + 1], [text], "multimodal")[0]
            assert texts["text_lengths"][i] == both["multimodal_lengths"][i] == len(states)
            close(texts["text_tokens"][start : start + len(states)], states)
            close(both["multimodal_tokens"][start : start + len(states)], seen)
            close(texts["text_embeds"][i], states[0])
            close(both["multimodal_embeds"][i], seen[0])
            start += len(states)
    for name in ("text_embeds", "multimodal_embeds"):  # the first states alone are the same
        found = extractor.text(TEXTS) if name == "text_embeds" else extractor.multimodal(images[:3], TEXTS)
        close(found[name], (texts | both)[name])


def test_the_verb_writes_vectors_whose_products_are_the_cosines_of_itc(run, pictures, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("A red dog!\n\ngreen\n")
    output = tmp_path / "new" / "feats.npz"
    code, out, _ = blipfast(
        capsys,
        "--model",
        run,
        "--output",
        output,
        "--texts",
        tmp_path / "texts.txt",
        "--batch-size",
        2,
        *pictures,
    )
    assert code == 0 and "image_feat [3, 8]" in out and "text_feat [2, 8]" in out
    with np.load(output) as feats:
        assert feats["paths"].tolist() == pictures and feats["texts"].tolist() == ["A red dog!", "green"]
        assert set(feats) == {"paths", "texts", "image_embeds", "image_feat", "text_embeds", "text_feat"}
        with torch.no_grad():
            cosines = load_matcher(run)(pixels(pictures), ["a red dog", "green"], "itc")
        close(feats["image_feat"] @ feats["text_feat"].T, cosines)
        assert feats["image_embeds"].shape == (3, 32) and feats["text_embeds"].shape == (2, 48)


def test_each_mode_writes_what_it_is_about(run, pictures, tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"caption": "{text}"}}\n' for text in TEXTS))
    common = ["--model", run, "--output", tmp_path / "f.npz", "--texts", tmp_path / "texts.jsonl"]
    names = {
        "image": {"paths", "image_embeds", "image_feat"},
        "text": {"texts", "text_embeds", "text_feat"},
        "multimodal": {"paths", "texts", "multimodal_embeds"},
    }
    for mode, expected in names.items():
        assert blipfast(capsys, *common, "--mode", mode, "--dtype", "float16", *pictures)[0] == 0
        with np.load(tmp_path / "f.npz") as feats:
            assert set(feats) == expected
            assert all(feats[name].dtype == np.float16 for name in expected - {"paths", "texts"})
    assert blipfast(capsys, *common, "--mode", "text", "--tokens")[0] == 0
    with np.load(tmp_path / "f.npz") as feats:
        assert (
            feats["text_lengths"].sum() == len(feats["text_tokens"])
            and feats["text_lengths"].dtype == np.int64
        )
    (tmp_path / "one.txt").write_text("a red dog")
    pairs = [*common[:-1], tmp_path / "one.txt", "--mode", "multimodal"]
    assert blipfast(capsys, *pairs, *pictures)[0] == 0
    with np.load(tmp_path / "f.npz") as feats, torch.no_grad():
        expected = load_features(run)(pixels(pictures), ["a red dog"] * 3, "multimodal")[:, 0]
        close(feats["multimodal_embeds"], expected)


def test_a_folder_stands_for_the_pictures_below_it(run, pictures, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    Image.new("RGB", (20, 30)).save(tmp_path / "more" / "black.png")
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS, "black"]))
    common = ["--model", run, "--output", tmp_path / "f.npz", "--mode", "multimodal"]
    assert blipfast(capsys, *common, "--texts", tmp_path / "texts.txt", tmp_path)[0] == 0
    with np.load(tmp_path / "f.npz") as feats:
        assert feats["paths"].tolist() == [*sorted(pictures), str(tmp_path / "more" / "black.png")]
    code, _, err = blipfast(capsys, "--model", run, "--output", tmp_path / "f.npz", run)
    assert code == 2 and "there are no pictures in this folder" in err


def test_a_broken_picture_is_named_and_left_out_with_its_text(run, pictures, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    common = [
        "--model",
        run,
        "--output",
        tmp_path / "f.npz",
        "--texts",
        tmp_path / "texts.txt",
        "--batch-size",
        2,
    ]
    code, _, err = blipfast(capsys, *common, "--mode", "multimodal", pictures[0], broken, pictures[1])
    assert code == 1 and "broken.png: not a picture" in err
    with np.load(tmp_path / "f.npz") as feats, torch.no_grad():
        assert feats["paths"].tolist() == pictures[:2] and feats["texts"].tolist() == [TEXTS[0], TEXTS[2]]
        seen = load_features(run)(pixels(pictures[1:2]), [TEXTS[2]], "multimodal")
        close(feats["multimodal_embeds"][1], seen[0, 0])
    (tmp_path / "f.npz").unlink()
    assert blipfast(capsys, "--model", run, "--output", tmp_path / "f.npz", broken)[0] == 2
    assert not list(tmp_path.glob("f.npz*")), "nothing half-written"


def test_a_model_without_projections_gives_its_states(small, pictures, tmp_path, capsys):
    (tmp_path / "vqa").mkdir()
    tokenizer = train_tokenizer(TEXTS, 300)
    folder = save(tmp_path / "vqa", BLIP_VQA(**small, tokenizer=tokenizer), tokenizer, small)
    assert blipfast(capsys, "--model", folder, "--output", tmp_path / "f.npz", *pictures)[0] == 0
    with np.load(tmp_path / "f.npz") as feats:
        assert set(feats) == {"paths", "image_embeds"}


@pytest.mark.parametrize(
    "args, said",
    [
        ([], "Name at least one picture, or texts"),
        (["--mode", "text", "a.png"], "Mode text needs texts"),
        (["--mode", "image"], "Name at least one picture."),
        (["--texts", "none.txt"], "none.txt: there is no such file"),
        (["--texts", "{folder}/texts.txt", "--mode", "multimodal", "a.png"], "3 texts for 1 pictures"),
        (["--texts", "{folder}/empty.txt"], "empty.txt: there are no texts in it"),
    ],
)
def test_a_mistake_is_one_line_before_any_model_is_loaded(tmp_path, args, said, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    (tmp_path / "empty.txt").touch()
    args = [arg.format(folder=tmp_path) for arg in args]
    code, _, err = blipfast(capsys, "--model", "nothing", "--output", tmp_path / "f.npz", *args)
    assert code == 2 and said in err and err.count("\n") == 1
