"""The shipped emoji set and how it is unpacked."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from blipfast.data import emoji

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    return emoji.unpack(tmp_path_factory.mktemp("set") / "emoji")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plain(caption: str) -> str:
    return " ".join(re.findall(r"\w+", caption.lower()))


def test_shipped_files_are_those_the_tool_made_and_stay_under_eight_megabytes():
    sums = dict(line.split()[::-1] for line in (emoji.ASSETS / "SHA256SUMS").read_text().splitlines())
    shipped = {path.name: path.read_bytes() for path in emoji.ASSETS.iterdir() if path.name != "SHA256SUMS"}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in shipped.items()} == sums
    assert sum(map(len, shipped.values())) < 8_000_000


def test_every_vendor_is_credited_and_freely_licensed():
    notice = " ".join((ROOT / "NOTICE").read_text(encoding="utf-8").split())
    for vendor in emoji.vendors().values():
        assert vendor["licence"] in ("Apache-2.0", "MIT", "CC-BY-4.0")
        assert f"{vendor['name']}.webp; npm {vendor['package']} {vendor['version']})" in notice
        assert vendor["url"] in notice


def test_sheets_hold_a_drawing_for_every_line_that_lists_the_vendor():
    for name, vendor in emoji.vendors().items():
        drawn = list(emoji.pictures(name))
        assert len(drawn) == vendor["pictures"]
        assert all(picture.getbbox() for _, picture in drawn)  # no empty cell


def test_names_and_slugs_tell_emoji_apart():
    index = emoji.read_index()
    assert (
        len({line["slug"] for line in index}) == len(index) == len({line["name"].lower() for line in index})
    )


def test_annotations_name_pictures_that_open(unpacked):
    for part in ("train", "test"):
        for line in lines(unpacked / f"{part}.jsonl"):
            assert line["caption"].strip() and isinstance(line["image_id"], int)
            with Image.open(unpacked / line["image"]) as picture:
                assert picture.mode == "RGBA" and picture.size == (64, 64)


def test_the_unseen_vendor_and_its_family_are_not_in_training(unpacked):
    train, test = lines(unpacked / "train.jsonl"), lines(unpacked / "test.jsonl")
    assert {line["vendor"] for line in test} == {"fluent"}
    assert "fluent" not in {line["image"].split("/")[0] for line in train}
    train, test = emoji.split(unseen="noto")
    assert {line["vendor"] for line in test} == {"noto"}
    assert not {"noto", "noto-v1"} & {line["vendor"] for line in train}
    assert not (unpacked / "fluent" / "grinning-face.png").exists()


@pytest.mark.parametrize("groups, count", [("concrete", 3789), ("all", 6880)])
def test_captions_tested_are_unique_and_drawn_by_three_training_vendors(groups, count):
    train, test = emoji.split(groups=groups)
    assert (len(train), len(test)) == (count, 651)
    assert len({plain(line["caption"]) for line in test}) == len(test)
    drawn: dict[str, set[str]] = {}
    for line in train:
        drawn.setdefault(line["caption"], set()).add(line["vendor"])
    assert min(len(drawn[line["caption"]]) for line in test) >= 3


def test_pictures_of_one_name_share_their_id(unpacked):
    ids: dict[str, set[int]] = {}
    for line in lines(unpacked / "train.jsonl") + lines(unpacked / "test.jsonl"):
        ids.setdefault(line["caption"], set()).add(line["image_id"])
    assert all(len(found) == 1 for found in ids.values())
    assert len(set.union(*ids.values())) == len(ids)


def test_unpacking_again_does_nothing_and_another_choice_replaces(unpacked):
    before = (unpacked / "train.jsonl").stat().st_mtime_ns
    assert emoji.unpack(unpacked) == unpacked
    assert (unpacked / "train.jsonl").stat().st_mtime_ns == before
    (unpacked / "tokenizer.json").write_text("mine")
    emoji.unpack(unpacked, unseen="streamline")
    assert (unpacked / "tokenizer.json").read_text() == "mine"
    (unpacked / "tokenizer.json").unlink()
    assert {line["vendor"] for line in lines(unpacked / "test.jsonl")} == {"streamline"}
    assert [path.name for path in unpacked.parent.iterdir()] == ["emoji"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match="not an emoji set"):
        emoji.unpack(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize("choice", [{"unseen": "openmoji"}, {"groups": "some"}])
def test_a_choice_that_does_not_exist_is_named(tmp_path, choice):
    with pytest.raises(ValueError, match=next(iter(choice.values()))):
        emoji.unpack(tmp_path / "emoji", **choice)
    assert not (tmp_path / "emoji").exists()
