"""easy-VQA in official formats: the published split, statements that are as true as they say, nothing leaking."""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from importlib.util import find_spec
from io import BytesIO

import pytest
from PIL import Image

from blipfast.cli import main
from blipfast.config import config_from_dict
from blipfast.data import easy_nlvr, easy_vqa
from blipfast.data.check import check_data
from blipfast.data.nlvr import NLVRDataset
from blipfast.data.vqa import VQADataset

COUNTS = {"train": 120, "test": 24}


def looks(picture):
    """(colour, shape) of the miniature set's pictures."""
    return easy_vqa.COLOURS[picture * 7 % 8], easy_vqa.SHAPES[picture % 3]


def asked(picture):
    colour, shape = looks(picture)
    other = easy_vqa.COLOURS[(picture * 7 + 1) % 8]
    questions = [
        [f"what color is the {shape}?", colour, picture],
        [f"is there not a {other} shape?", "yes", picture],
        [f"is there a {other} shape in the image?", "no", picture],
    ]
    return questions[1:] if picture % 10 == 9 else questions  # of every tenth the questions do not tell all


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A small wheel laid out as easy_vqa-1.0-py3-none-any.whl is."""
    path = tmp_path_factory.mktemp("wheel") / "easy_vqa-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("easy_vqa/__init__.py", "")
        archive.writestr("easy_vqa/data/answers.txt", "yes\n")
        for split, count in COUNTS.items():
            questions = [question for picture in range(count) for question in asked(picture)]
            archive.writestr(f"easy_vqa/data/{split}/questions.json", json.dumps(questions))
            for picture in range(count):
                png = BytesIO()
                Image.new("RGB", (64, 64), looks(picture)[0]).save(png, "png")
                archive.writestr(f"easy_vqa/data/{split}/images/{picture}.png", png.getvalue())
    return path


@pytest.fixture(scope="module")
def folder(wheel, tmp_path_factory):
    return easy_vqa.unpack(tmp_path_factory.mktemp("easy") / "set", wheel)


def read(path):
    return json.loads(path.read_text())


def test_the_published_split_comes_in_the_official_schema_with_a_part_of_training_for_validation(folder):
    parts = {part: read(folder / f"vqa_{part}.json") for part in ("train", "val", "test")}
    assert len(parts["test"]) == sum(len(asked(picture)) for picture in range(24))
    assert len(parts["train"]) + len(parts["val"]) == sum(len(asked(picture)) for picture in range(120))
    shown = {part: {entry["image"] for entry in entries} for part, entries in parts.items()}
    assert shown["val"] == {f"train/{picture}.png" for picture in range(0, 120, 20)}
    assert not shown["train"] & shown["val"] and all(image.startswith("test/") for image in shown["test"])
    entry = parts["train"][0]
    assert entry["answer"] == ["blue" if entry["image"] == "train/15.png" else looks(1)[0]]
    assert {e["answer_type"] for e in parts["test"]} == {"yes/no", "other"}
    assert len(VQADataset(str(folder / "vqa_test.json"), split="test")) == len(parts["test"])
    assert set(read(folder / "answer_list.json")) == {e["answer"][0] for e in parts["train"]}


def truth(sentence, left, right):
    """Whether a statement holds, worked out from its words alone."""
    words = re.findall(r"\w+", sentence)
    colours, shapes = [w for w in words if w in easy_vqa.COLOURS], [w for w in words if w in easy_vqa.SHAPES]
    side = left if "left" in words else right
    if "left" in words or "right" in words:
        return side[0] == colours[0] if colours else side[1] == shapes[0]
    if "both" in words:
        return all((picture[0] in colours) or (picture[1] in shapes) for picture in (left, right))
    if "neither" in words:
        return left[0] != colours[0] and right[0] != colours[0]
    if "exactly" in words:
        return (left[1] == shapes[0]) != (right[1] == shapes[0])
    if "other" in words:
        return sorted([left[0], right[0]]) == sorted(colours)
    if "same" in words:
        return left[1] == right[1]
    if "different" in words:
        return left[0] != right[0]
    return (colours[0], shapes[0]) == left or (colours[0], shapes[0]) == right


def test_every_statement_is_as_true_as_its_label_and_each_sentence_is_both_equally_often(folder):
    for part, name in (("train", "train"), ("val", "dev"), ("test", "test")):
        statements = read(folder / f"nlvr_{name}.json")
        assert len(statements) == easy_nlvr.PAIRS[part]
        balance = Counter()
        for entry in statements:
            left, right = (looks(int(re.search(r"(\d+)\.png", image)[1])) for image in entry["images"])
            assert str(truth(entry["sentence"], left, right)) == entry["label"], entry
            assert entry["images"][0] != entry["images"][1]
            balance[entry["sentence"]] += 1 if entry["label"] == "True" else -1
        assert set(balance.values()) == {0}
        words = "|".join((*easy_vqa.COLOURS, *easy_vqa.SHAPES, "left", "right"))
        templates = {re.sub(rf"\b({words})\b", "_", sentence) for sentence in balance}
        assert len(templates) == 10 or part == "val"  # of the miniature's few pictures some are never true
    assert len(NLVRDataset(str(folder / "nlvr_dev.json"))) == easy_nlvr.PAIRS["val"]


def test_statements_of_a_part_are_about_its_own_pictures_whose_looks_are_told(folder):
    shown = {}
    for name, part in (("train", "train"), ("dev", "val"), ("test", "test")):
        shown[name] = {image for entry in read(folder / f"nlvr_{name}.json") for image in entry["images"]}
        assert shown[name] <= {entry["image"] for entry in read(folder / f"vqa_{part}.json")}
    assert "train/9.png" not in shown["train"] and "train/1.png" in shown["train"]


def test_captions_and_texts_are_of_training_pictures(folder):
    captions = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert {"image": "train/1.png", "caption": f"a {looks(1)[0]} {looks(1)[1]}"} in captions
    assert len(captions) == 120 - 6 - 12  # without validation pictures and those of unknown looks
    texts = (folder / "texts.txt").read_text().splitlines()
    assert len(texts) == len(set(texts)) and {"yes", "both pictures show a circle"} <= set(texts)


def test_our_own_check_finds_nothing_wrong(folder):
    for task, train, val, test in (
        ("vqa", "vqa_train", "vqa_val", "vqa_test"),
        ("nlvr", "nlvr_train", "nlvr_dev", "nlvr_test"),
    ):
        data = {
            "train": [str(folder / f"{train}.json")],
            "val": str(folder / f"{val}.json"),
            "test": str(folder / f"{test}.json"),
        }
        if task == "vqa":
            data["answers"] = str(folder / "answer_list.json")
        for report in check_data(config_from_dict({"task": task, "data": data})):
            assert report.bad == 0 and not report.notes


def test_the_verb_writes_once_says_what_and_leaves_other_folders_alone(wheel, tmp_path, capsys, monkeypatch):
    target = tmp_path / "set"
    assert main(["data", "easy-vqa", str(target), "--wheel", str(wheel)]) == 0
    assert "nlvr_test.json (2,000)" in capsys.readouterr().out
    before = (target / "vqa_test.json").stat().st_mtime_ns
    assert main(["data", "easy-vqa", str(target)]) == 0  # it is there: neither package nor wheel is needed
    assert (target / "vqa_test.json").stat().st_mtime_ns == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert main(["data", "easy-vqa", str(tmp_path / "full"), "--wheel", str(wheel)]) == 2
    assert "something else" in capsys.readouterr().err and (tmp_path / "full" / "thesis.txt").exists()
    monkeypatch.setattr(easy_vqa, "find_spec", lambda name: None)
    assert main(["data", "easy-vqa", str(tmp_path / "new")]) == 2
    assert "pip install 'blipfast[easy-vqa]'" in capsys.readouterr().err
    (tmp_path / "no.whl").write_text("no")
    assert main(["data", "easy-vqa", str(tmp_path / "new"), "--wheel", str(tmp_path / "no.whl")]) == 2
    assert "not a wheel" in capsys.readouterr().err
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))


@pytest.mark.skipif(find_spec("easy_vqa") is None, reason="needs easy-vqa: pip install 'blipfast[easy-vqa]'")
def test_the_real_set_has_its_published_numbers(tmp_path):
    counts = read(easy_vqa.unpack(tmp_path / "set") / easy_vqa.MARKER)
    assert counts["vqa_test.json"] == 9673 and counts["answer_list.json"] == 13
    assert counts["vqa_train.json"] + counts["vqa_val.json"] == 38575
    assert len(list((tmp_path / "set" / "train").iterdir())) == 4000
    assert len(list((tmp_path / "set" / "test").iterdir())) == 1000
