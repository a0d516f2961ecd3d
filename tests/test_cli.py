"""The command line: what it prints, where it fails, and how it says so."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image

from blipfast import cli, doctor
from blipfast.config import Config, save_config
from blipfast.data.readers import read_captions
from blipfast.text import load_tokenizer, train_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What a training run leaves behind, of a model that has learned nothing."""
    from blipfast.models.blip_pretrain import BLIP_Pretrain
    from blipfast.models.checkpoint import save_weights

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(["a red dog", "a green apple", "a blue car"], 300)
    config = Config()
    config.model.vit = {"width": 16, "depth": 1, "heads": 2, "patch_size": 8}
    config.model.med_config = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config.model.image_size, config.model.embed_dim, config.model.queue_size = 16, 8, 4
    model = BLIP_Pretrain(
        config.model.med_config, 16, config.model.vit, embed_dim=8, queue_size=4, tokenizer=tokenizer
    )
    save_config(config, folder / "config.yaml")
    tokenizer.save(folder / "tokenizer.json")
    save_weights(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture()
def pictures(tmp_path):
    for name, colour in (("red.png", "red"), ("green.png", "green")):
        Image.new("RGB", (20, 30), colour).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    return tmp_path


def blipfast(capsys, *args):
    code = cli.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_reader_that_has_seen_enough_is_no_error():
    """`blipfast caption ... | head`."""
    code = """
import argparse, sys
from blipfast import cli
def run(args):
    for i in range(10**6):
        print(i)
parser = argparse.ArgumentParser()
parser.set_defaults(run=run)
cli.make_parser = lambda: parser
sys.exit(cli.main([]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as running:
        assert running.stdout.readline().strip() == b"0"
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait() == 141


@pytest.mark.parametrize("args", [["--help"], ["caption", "--help"], ["tokenizer", "train", "--help"]])
def test_help_is_shown_without_loading_torch(args):
    code = (
        f"import sys; sys.argv = ['blipfast', *{args}]; from blipfast import cli\n"
        "try: cli.main()\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert "usage: blipfast" in done.stdout
    assert done.stdout.endswith("False\n")


def test_the_help_of_every_verb_shows_an_example():
    def parsers(parser):
        for action in parser._actions:
            for below in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
                yield below
                yield from parsers(below)

    found = {parser.prog: parser.format_help() for parser in parsers(cli.make_parser())}
    assert len(found) > 13 and "blipfast data easy-vqa" in found
    for name, text in found.items():
        assert re.search(rf"\nexamples?:\n(.*\n)*.*{name}", text), name
        assert not re.search(r" [\w.]+=\[", text), f"{name}: zsh needs quotes around a list"


def test_the_module_runs_like_the_command():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "blipfast"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "doctor" in done.stdout


def test_pictures_are_captioned_and_a_broken_one_does_not_stop_the_rest(capsys, run_folder, pictures):
    names = [pictures / name for name in ("red.png", "broken.png", "missing.png", "green.png")]
    code, out, err = blipfast(capsys, "caption", "--model", run_folder, "--batch-size", 3, *names)
    assert code == 1
    assert [line.split(": ")[0] for line in out.splitlines()] == [str(names[0]), str(names[3])]
    assert [str(name) in line for name, line in zip(names[1:3], err.splitlines(), strict=True)] == [
        True,
        True,
    ]
    assert all(line.startswith("blipfast: ") for line in err.splitlines())


def test_captions_as_json_name_path_and_caption_or_error(capsys, run_folder, pictures):
    names = [str(pictures / name) for name in ("broken.png", "red.png")]
    code, out, _ = blipfast(capsys, "caption", "--json", "--model", run_folder, *names)
    broken, good = json.loads(out)
    assert (code, broken["path"], good["path"]) == (1, *names)
    assert "broken.png" in broken["error"]
    assert isinstance(good["caption"], str)


def test_caption_options_reach_the_model_and_the_run_gives_their_defaults(
    capsys, monkeypatch, pictures, tmp_path
):
    called = {}

    class Captioner(torch.nn.Module):
        visual_encoder = types.SimpleNamespace(image_size=16)

        def generate_stream(self, batches, **how):
            for images in batches:
                called.update(how, shape=tuple(images.shape))
                yield from [["a dog"]] * len(images)

    def load(path, **how):
        called.update(how)
        return Captioner()

    monkeypatch.setattr("blipfast.models.load.load_captioner", load)
    config = Config()
    config.evaluate.max_length, config.evaluate.min_length, config.evaluate.num_beams = 12, 0, 4
    config.evaluate.repetition_penalty, config.evaluate.prompt = 1.25, "two dogs "
    save_config(config, tmp_path / "config.yaml")
    code, out, _ = blipfast(capsys, "caption", "--model", tmp_path, pictures / "red.png")
    assert (code, out) == (0, f"{pictures / 'red.png'}: a dog\n")
    assert called == {
        "shape": (1, 3, 16, 16), "num_beams": 4, "max_length": 12, "min_length": 0, "repetition_penalty": 1.25,
        "prompt": "two dogs ",
    }  # fmt: skip
    called.clear()
    options = "--beams 2 --max-length 9 --min-length 1 --repetition-penalty 1.5 --prompt".split()
    assert blipfast(capsys, "caption", "--model", tmp_path, *options, "a ", pictures / "red.png")[0] == 0
    assert called == {
        "shape": (1, 3, 16, 16), "num_beams": 2, "max_length": 9, "min_length": 1, "repetition_penalty": 1.5,
        "prompt": "a ",
    }  # fmt: skip
    called.clear()
    options = ["--sample", "--top-p", 0.5]
    assert blipfast(capsys, "caption", "--model", tmp_path, *options, pictures / "red.png")[0] == 0
    assert called == {
        "shape": (1, 3, 16, 16), "sample": True, "top_p": 0.5, "max_length": 12, "min_length": 0, "prompt": "two dogs ",
    }  # fmt: skip


@pytest.mark.parametrize(
    "options, said",
    [
        (["--sample", "--beams", 2], "--beams does nothing with --sample"),
        (["--sample", "--repetition-penalty", 2], "--repetition-penalty does nothing with --sample"),
        (["--top-p", 0.5], "--top-p does nothing without --sample"),
        (["--overwrite"], "--overwrite does nothing without --txt"),
    ],
)
def test_caption_options_that_would_do_nothing_are_refused(capsys, run_folder, pictures, options, said):
    code, _, err = blipfast(capsys, "caption", "--model", run_folder, *options, pictures / "red.png")
    assert code == 2 and said in err


def test_a_folder_is_captioned_into_text_files_and_goes_on_where_it_was_interrupted(
    capsys, run_folder, pictures, tmp_path
):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("red.png", "green.png", "broken.png"):
        shutil.copy(pictures / name, folder / "more")
    (folder / "more" / "red.caption").write_text("mine")
    shutil.copy(pictures / "red.png", folder)
    command = ["caption", "--model", run_folder, "--txt", folder]
    code, out, err = blipfast(capsys, *command)
    assert code == 1 and "broken.png" in err and "1 of 4 pictures have a text already" in err
    assert out == "2 captions written beside their pictures\n"
    texts = {str(path.relative_to(folder)): path.read_text() for path in folder.glob("**/*.txt")}
    assert set(texts) == {"red.txt", "more/green.txt"} and all(text.endswith("\n") for text in texts.values())
    code, out, _ = blipfast(capsys, "caption", "--model", run_folder, folder / "red.png")
    assert out == f"{folder / 'red.png'}: {texts['red.txt']}"
    (folder / "red.txt").unlink()
    code, out, err = blipfast(capsys, *command)
    assert out == "1 caption written beside its picture\n" and "2 of 4 pictures" in err
    code, out, _ = blipfast(capsys, *command, "--overwrite")
    assert out == "3 captions written beside their pictures\n"
    (tmp_path / "none").mkdir()
    code, _, err = blipfast(capsys, "caption", "--model", run_folder, tmp_path / "none")
    assert code == 2 and "there are no pictures in this folder" in err


def test_json_that_is_cut_short_holds_what_was_done(capsys, run_folder, pictures, monkeypatch):
    from blipfast.models.blip import BLIP_Decoder

    stream = BLIP_Decoder.generate_stream

    def interrupted(*args, **how):
        yield next(stream(*args, **how))
        raise KeyboardInterrupt

    monkeypatch.setattr(BLIP_Decoder, "generate_stream", interrupted)
    names = [str(pictures / name) for name in ("broken.png", "red.png", "green.png")]
    code, out, _ = blipfast(capsys, "caption", "--json", "--model", run_folder, *names)
    assert code == 130 and [entry["path"] for entry in json.loads(out)] == names[:2]


def test_sampling_is_a_function_of_the_seed(capsys, run_folder, pictures):
    def sampled(seed):
        return blipfast(
            capsys, "caption", "--model", run_folder, "--sample", "--seed", seed, pictures / "red.png"
        )[1]

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_texts_are_scored_against_a_picture(capsys, run_folder, pictures):
    from blipfast.data.images import load_image
    from blipfast.data.transforms import eval_transform
    from blipfast.models.load import load_matcher

    texts = ["a red dog", "A GREEN apple."]
    exact = ["--json", "--precision", "fp32", "--model", run_folder]
    code, out, _ = blipfast(capsys, "match", *exact, pictures / "red.png", *texts)
    scores = json.loads(out)["scores"]
    model = load_matcher(run_folder).eval()
    image = eval_transform(16)(load_image(pictures / "red.png"), None)[None]
    with torch.no_grad():
        cosines = model(image, ["a red dog", "a green apple"], match_head="itc")[0]
        logits = [model(image, [text], match_head="itm")[0] for text in ("a red dog", "a green apple")]
    assert code == 0
    assert [score["text"] for score in scores] == texts
    torch.testing.assert_close(torch.tensor([score["itc"] for score in scores]), cosines)
    torch.testing.assert_close(
        torch.tensor([score["itm"] for score in scores]), torch.stack(logits).softmax(1)[:, 1]
    )

    code, out, _ = blipfast(capsys, "match", "--model", run_folder, pictures / "red.png", *texts)
    assert code == 0
    assert [line.split("  ")[-1] for line in out.splitlines()] == ["text", *texts]

    code, out, err = blipfast(capsys, "match", *exact, pictures, *texts)
    found = json.loads(out)
    assert code == 1 and "broken.png" in err
    assert [entry["path"] for entry in found] == [str(pictures / name) for name in ("green.png", "red.png")]
    assert found[1]["scores"] == scores
    code, out, _ = blipfast(capsys, "match", "--model", run_folder, pictures, *texts)
    assert out.splitlines()[0] == str(pictures / "green.png") and len(out.splitlines()) == 8
    assert blipfast(capsys, "match", "--model", run_folder, pictures / "broken.png", *texts)[0] == 2


@pytest.mark.parametrize(
    "args, said",
    [
        (["caption", "--model", "no/such/run", "x.png"], "no/such/run"),
        (["match", "--model", "no/such/run", "x.png", "text"], "no/such/run"),
        (["convert", "no/such/run", "--to", "official", "--output", "x.pth"], "no/such/run"),
        (
            ["tokenizer", "train", "none.txt", "--output", "t.json"],
            "none.txt: there is no such caption file.",
        ),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(capsys, args, said):
    code, out, err = blipfast(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith("blipfast: ")
    assert err.count("\n") == 1
    assert said in err


def test_an_unusable_device_is_named(capsys, run_folder, pictures):
    code, _, err = blipfast(capsys, "caption", "--device", "cud", "--model", run_folder, pictures / "red.png")
    assert code == 2
    assert err.startswith("blipfast: --device cud: ")


def test_a_tokenizer_is_trained_from_every_kind_of_caption_file(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("a red dog\n\na red cat\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(
        '{"image": "x", "caption": "一只狗"}\n\n{"caption": "一只狗"}\n', encoding="utf-8"
    )
    (tmp_path / "c.json").write_text(
        '[{"caption": ["빨간 개", "빨간 개"]}, {"caption": "x"}]', encoding="utf-8"
    )
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.json")]
    assert [list(read_captions(path)) for path in files] == [
        ["a red dog", "a red cat"], ["一只狗", "一只狗"], ["빨간 개", "빨간 개", "x"],
    ]  # fmt: skip
    output = tmp_path / "tokenizer.json"
    code, out, _ = blipfast(capsys, "tokenizer", "train", *files, "--output", output, "--vocab-size", 300)
    tokenizer = load_tokenizer(output)
    assert (code, out) == (0, f"wrote {output}: {len(tokenizer)} tokens\n")
    assert len(tokenizer) <= 300
    assert len(tokenizer("一只狗").input_ids) == 3


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("x.jsonl", '{"caption": "a"}\n{"image": "b"}\n', ':2: "caption" is missing'),
        ("x.json", '[{"caption": 3}]', ':1: "caption" is missing or not text'),
        ("x.json", "[{", "x.json:1: not valid JSON"),
        ("x.json", "3", "x.json: expected a JSON list"),
        ("x.jsonl", '{"caption": ["a", 3]}', 'x.jsonl:1: "caption" is missing or not text'),
        ("x.txt", "", "no caption"),
    ],
)
def test_a_bad_caption_file_is_named_and_nothing_is_overwritten(capsys, tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    (tmp_path / "old.json").write_text("old")
    code, _, err = blipfast(capsys, "tokenizer", "train", tmp_path / name, "--output", tmp_path / "old.json")
    assert code == 2
    assert said in err
    assert (tmp_path / "old.json").read_text() == "old"


def test_the_emoji_verb_unpacks_what_and_where_it_is_told(capsys, monkeypatch, tmp_path):
    told = []

    def unpack(directory, unseen, groups):
        told.append((directory, unseen, groups))
        return tmp_path

    monkeypatch.setattr("blipfast.data.emoji.unpack", unpack)
    assert blipfast(capsys, "data", "emoji", tmp_path)[0] == 0
    assert blipfast(capsys, "data", "emoji", tmp_path, "--unseen", "noto", "--groups", "all")[0] == 0
    assert told == [(str(tmp_path), "fluent", "concrete"), (str(tmp_path), "noto", "all")]


def test_doctor_reports_the_installation(capsys):
    code, out, _ = blipfast(capsys, "doctor")
    assert code == 0
    assert version("torch") in out
    for name in (
        "cpu",
        "compiler",
        "gpu",
        "deepspeed",
        "triton",
        "flash-attn",
        "xformers",
        "simplejpeg",
        "apex",
        "precision auto (cpu)",
        "cached_attention (cpu)",
    ):
        assert any(line.startswith(f"{name} ") for line in out.splitlines())


@pytest.mark.parametrize(
    "files, said",
    [
        ([], "not installed"),
        (["apex/__init__.py"], "not NVIDIA's"),
        (["apex/__init__.py", "apex/optimizers/fused_adam.py"], "without its CUDA extension"),
        (["apex/__init__.py", "apex/optimizers/fused_adam.py", "amp_C.py"], "NVIDIA's, with amp_C"),
    ],
)
def test_doctor_tells_nvidias_apex_from_its_namesake_without_importing_it(monkeypatch, tmp_path, files, said):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert said in doctor.apex()


def test_two_pictures_do_not_share_a_text_file(capsys, run_folder, pictures):
    shutil.copy(pictures / "red.png", pictures / "red.jpg")
    code, _, err = blipfast(
        capsys, "caption", "--model", run_folder, "--txt", pictures / "red.png", pictures / "red.jpg"
    )
    assert code == 2 and "red.png and" in err and "would share" in err
    assert not (pictures / "red.txt").exists()


def test_a_penalty_of_zero_is_refused_and_not_replaced(capsys, run_folder, pictures):
    code, _, err = blipfast(
        capsys, "caption", "--model", run_folder, "--repetition-penalty", 0, pictures / "red.png"
    )
    assert code == 2 and "repetition_penalty must be above 0" in err
