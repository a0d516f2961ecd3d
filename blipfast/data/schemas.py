"""The official annotation formats: what keys an entry has, and what is wrong with one that has not.

Source: official BLIP's `data/*_dataset.py`. An entry of one's own data has the same keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

KARPATHY = ("coco", "flickr30k")  # whose captions and splits are Andrej Karpathy's


@dataclass
class Entry:
    """What an entry names. `root` "vg" means that the picture lies under data.vg_root; `problems` name the key."""

    pictures: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    root: str = ""
    problems: list[str] = field(default_factory=list)

    def texts_of(self, value: Any, key: str, many: bool) -> list[str]:
        """`value` as non-empty texts, one or (many) a list; otherwise a problem and []."""
        texts = value if many and isinstance(value, list) else [value]
        if value in (None, "", []):
            self.problems.append(f'"{key}" is {"missing" if value is None else "empty"}')
        elif not all(isinstance(text, str) for text in texts):
            self.problems.append(
                f'"{key}" should be text{" or a list of texts" if many else ""}, found {_show(value)}'
            )
        elif not all(text.strip() for text in texts):
            self.problems.append(f'"{key}" holds an empty text')
        else:
            return texts
        return []

    def wrong(self, value: Any, key: str, expected: str) -> None:
        """Note that `key` is missing, or is not what was expected."""
        found = f"should be {expected}, found {_show(value)}"
        self.problems.append(f'"{key}" {"is missing" if value is None else found}')

    def picture_of(self, value: Any, key: str = "image") -> None:
        self.pictures += self.texts_of(value, key, many=False)


def official_file(source: Path, format: str, split: str) -> Path:
    """The annotation file of a split ("train", "val", "test"): `source`, or the official one in the folder `source`."""
    if format in FORMATS and FORMATS[format].file and source.is_dir():
        return source / FORMATS[format].file.format(split)
    return source


def read_entry(format: str, value: Any, split: str) -> Entry:
    """Read one entry of an annotation file; what is wrong with it is in its `problems`."""
    entry = Entry()
    if not isinstance(value, dict):
        entry.problems.append(f"expected an object, found {_show(value)}")
    elif "images" in value and "annotations" in value:
        entry.problems.append("this is COCO's own annotation format; expected a list of entries")
    else:
        FORMATS[format].read(entry, value, split)
    return entry


def _pair(entry: Entry, value: dict[str, Any], split: str) -> None:
    entry.picture_of(value.get("image"))
    entry.texts = entry.texts_of(value.get("caption"), "caption", many=True)
    if not isinstance(value.get("image_id"), str | int | None):
        entry.wrong(value["image_id"], "image_id", "a number or text")


def _nocaps(entry: Entry, value: dict[str, Any], split: str) -> None:
    entry.picture_of(value.get("image"))
    try:
        int(value.get("img_id"))
    except (TypeError, ValueError):
        entry.wrong(value.get("img_id"), "img_id", "a number")


def _vqa(entry: Entry, value: dict[str, Any], split: str) -> None:
    entry.root = "vg" if value.get("dataset") == "vg" else ""
    entry.picture_of(value.get("image"))
    entry.texts = entry.texts_of(value.get("question"), "question", many=False)
    if value.get("dataset") not in (None, "vqa", "vg"):
        entry.wrong(value["dataset"], "dataset", '"vqa" or "vg"')
    if "answer" in value or split == "train":
        entry.answers = entry.texts_of(value.get("answer"), "answer", many=True)
    elif value.get("question_id") is None:
        entry.wrong(None, "question_id", "the question's number")


def _nlvr(entry: Entry, value: dict[str, Any], split: str) -> None:
    images = value.get("images")
    if isinstance(images, list) and len(images) == 2:
        for image in images:
            entry.picture_of(image, "images")
    else:
        entry.wrong(images, "images", "a list of two paths")
    entry.texts = entry.texts_of(value.get("sentence"), "sentence", many=False)
    if "label" not in value and split == "test":
        return  # hidden, as in NLVR2's second test set
    if str(value.get("label")).lower() not in ("true", "false"):
        entry.wrong(value.get("label"), "label", '"True" or "False"')


def _msrvtt(entry: Entry, value: dict[str, Any], split: str) -> None:
    entry.picture_of(value.get("clip_name"), "clip_name")
    entry.texts = entry.texts_of(value.get("caption"), "caption", many=False)


class Format(NamedTuple):
    """An annotation format."""

    read: Callable[[Entry, dict[str, Any], str], None]  # fills the entry from its JSON object, of a split
    expected: str  # what an entry needs, as a sentence
    file: str = ""  # the official file of a split in a folder of annotations


_PAIR = 'Each entry needs {"image": path, "caption": text or list of texts}'
FORMATS = {
    "pairs": Format(_pair, _PAIR),
    "coco": Format(_pair, _PAIR, "coco_karpathy_{}.json"),
    "flickr30k": Format(_pair, _PAIR, "flickr30k_{}.json"),
    "nocaps": Format(_nocaps, 'Each entry needs {"image": path, "img_id": number}', "nocaps_{}.json"),
    "vqa": Format(
        _vqa,
        'Each entry needs {"image": path, "question": text, "answer": text or list of texts}, '
        'and may have "dataset": "vqa" or "vg"; a test set without answers needs "question_id"',
    ),
    "nlvr": Format(
        _nlvr, 'Each entry needs {"images": [path, path], "sentence": text, "label": "True" or "False"}'
    ),
    "msrvtt": Format(_msrvtt, 'Each entry needs {"clip_name": name, "caption": text}', "msrvtt_{}.jsonl"),
}


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
