"""The official annotation formats: what keys an entry has, and what is wrong with one that has not.

Source: official BLIP's `data/*_dataset.py`. An entry of one's own data has the same keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PAIR = 'Each entry needs {"image": path, "caption": text or list of texts}'
EXPECTED = {
    "pairs": _PAIR,
    "coco": _PAIR,
    "flickr30k": _PAIR,
    "nocaps": 'Each entry needs {"image": path, "img_id": number}',
    "vqa": 'Each entry needs {"image": path, "question": text, "answer": text or list of texts}, '
    'and may have "dataset": "vqa" or "vg"; a test set without answers needs "question_id"',
    "nlvr": 'Each entry needs {"images": [path, path], "sentence": text, "label": "True" or "False"}',
    "msrvtt": 'Each entry needs {"clip_name": name, "caption": text}',
}
OFFICIAL_FILES = {  # in a folder of annotations
    "coco": "coco_karpathy_{}.json",
    "flickr30k": "flickr30k_{}.json",
    "nocaps": "nocaps_{}.json",
    "msrvtt": "msrvtt_{}.jsonl",
}


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
    if format not in OFFICIAL_FILES or not source.is_dir():
        return source
    return source / OFFICIAL_FILES[format].format(split)


def read_entry(format: str, value: Any, split: str) -> Entry:
    """Read one entry of an annotation file; what is wrong with it is in its `problems`."""
    entry = Entry()
    if not isinstance(value, dict):
        entry.problems.append(f"expected an object, found {_show(value)}")
    elif "images" in value and "annotations" in value:
        entry.problems.append("this is COCO's own annotation format; expected a list of entries")
    else:
        _READERS[format](entry, value, split)
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


_READERS: dict[str, Callable[[Entry, dict[str, Any], str], None]] = {
    "pairs": _pair,
    "coco": _pair,
    "flickr30k": _pair,
    "nocaps": _nocaps,
    "vqa": _vqa,
    "nlvr": _nlvr,
    "msrvtt": _msrvtt,
}


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
