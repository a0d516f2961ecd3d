"""Reading annotation files: official JSON lists, JSONL, and folders of pictures with a text file beside each.

Every reader is a generator of `Record`s and checks each line as it passes, so a bad one is found on opening; `READERS`
names them. What an entry of a JSON file needs stands in `schemas`.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from blipfast.data import schemas

PICTURES = frozenset(".jpg .jpeg .jpe .png .webp .gif .bmp .tif .tiff .avif .ppm".split())
SIDECARS = (".txt", ".caption")
_EXPECTED = schemas.FORMATS["pairs"].expected
_CHUNK = 1 << 20  # characters
_LONGEST_ENTRY = 1 << 24
_SEPARATORS = re.compile(r"[\s,]*")

logger = logging.getLogger(__name__)


class Record(NamedTuple):
    """A picture with its captions: `image` is a path on this machine, `image_id` what the file gives, if anything."""

    image: str
    captions: list[str]
    image_id: str | int | None


def read_source(
    source: str, image_root: str = "", format: str = "auto", split: str = "train"
) -> Iterator[Record]:
    """Read one source by the reader of its `format` in `READERS`; "auto" tells a folder from an annotation file.

    Paths of pictures are relative to `image_root`, or else to the folder of the annotation file. For "coco" and
    "flickr30k" the source may be the folder that holds the Karpathy files; `split` then says which.
    Raises FileNotFoundError, or ValueError naming the file and line.
    """
    if format != "auto" and format not in READERS:
        raise ValueError(f"data.format: {format!r} is not one of auto, shards, {', '.join(READERS)}.")
    path = schemas.official_file(Path(source).expanduser(), format, split)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder. Check data.train and data.test.")
    if image_root and not Path(image_root).expanduser().is_dir():
        raise FileNotFoundError(
            f"{image_root}: there is no such folder. Set data.image_root to where the pictures are."
        )
    if format == "auto":
        format = "folder" if path.is_dir() else "pairs"
    return READERS[format](path, Path(image_root).expanduser() if image_root else path.parent)


def _read_pairs(path: Path, root: Path) -> Iterator[Record]:
    """Entries {"image", "caption", perhaps "image_id"} of a JSON list or JSON lines."""
    if path.is_dir():
        raise ValueError(f"{path}: a folder, but this data.format needs a .json or .jsonl file.")
    for line, value in read_entries(path):
        image, caption = (value.get("image"), value.get("caption")) if type(value) is dict else (None, None)
        # of a hundred million entries most are like this, and need not be looked at as closely
        usual = type(image) is str and type(caption) is str and image.strip() and caption.strip()
        if usual and "image_id" not in value:
            yield Record(os.path.join(root, image), [caption], None)
        else:
            entry = _checked(path, line, value, "pairs", "train")
            yield Record(os.path.join(root, entry.pictures[0]), entry.texts, value.get("image_id"))


def checked_entries(
    path: Path, format: str, split: str = "train"
) -> Iterator[tuple[dict[str, Any], schemas.Entry]]:
    """Each entry of a JSON file, as it is and as `schemas` reads it; ValueError for a bad one, naming line and key."""
    for line, value in read_entries(path, schemas.FORMATS[format].expected):
        yield value, _checked(path, line, value, format, split)


def _checked(path: Path, line: int, value: Any, format: str, split: str) -> schemas.Entry:
    entry = schemas.read_entry(format, value, split)
    if entry.problems:
        raise ValueError(f"{path}:{line}: {entry.problems[0]}. {schemas.FORMATS[format].expected}.")
    return entry


def read_entries(path: Path, expected: str = _EXPECTED) -> Iterator[tuple[int, Any]]:
    """(line, value) of each entry of a JSON list, or of a file of JSON lines, as the file streams by.

    expected: the sentence that says what an entry should be. Raises FileNotFoundError, or ValueError naming file and
    line, for what is missing, empty or not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file. {expected}.")
    start = first_character(path, expected)
    if start not in ("[", "{"):
        raise ValueError(f"{path}: expected a JSON list or JSON lines, but the file starts with {start!r}.")
    try:
        yield from json_list(path, expected) if start == "[" else _json_lines(path, expected)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}).") from error


def first_character(path: Path, expected: str = _EXPECTED) -> str:
    """The first character that counts: "[" of a JSON list, "{" of JSON lines. ValueError for an empty file."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        raise ValueError(f"{path}: the file is empty. {expected}.")
    return head[:1].decode("latin-1")


def _json_lines(path: Path, expected: str) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not valid JSON ({error.msg}). {expected}, one a line."
                ) from None


def json_list(path: Path, expected: str = _EXPECTED) -> Iterator[tuple[int, Any]]:
    """Entries of a JSON list with their lines, decoded as the file streams by: the lists of BLIP are gigabytes."""
    decode = json.JSONDecoder().raw_decode
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(_CHUNK)
        position, line = text.index("[") + 1, 1
        counted = 0  # lines are counted up to here
        while True:
            position = _SEPARATORS.match(text, position).end()
            line += text.count("\n", counted, position)
            counted = position
            if text.startswith("]", position):
                return
            try:
                entry, end = decode(text, position)
            except json.JSONDecodeError as error:  # or cut off by the end of the chunk
                more = file.read(_CHUNK) if len(text) - position < _LONGEST_ENTRY else ""
                if not more:
                    why = error.msg if position < len(text) else "the list has no end; is the file truncated?"
                    raise ValueError(f"{path}:{line}: not valid JSON ({why}). {expected}.") from None
                text, position, counted = text[position:] + more, 0, 0
                continue
            yield line, entry
            position = end


def _read_folder(folder: Path, root: Path) -> Iterator[Record]:
    """Pictures below `folder`, in the order of their paths, with the text in the .txt or .caption file beside each."""
    pictures = bare = 0
    for picture, sidecar in pictures_below(folder):
        pictures += 1
        if sidecar is None:
            bare += 1
            continue
        yield Record(picture, [sidecar_text(Path(sidecar))], None)
    if pictures == bare:
        what = f"none of its {pictures} pictures has" if pictures else "holds no pictures with"
        raise ValueError(f"{folder}: {what} a caption file (.txt or .caption, same name) beside it.")
    if bare:
        logger.warning("%s: %d of %d pictures have no caption file and are left out.", folder, bare, pictures)


# data.format -> reader of (file or folder, folder of the pictures); shards are read by `shards`
READERS: dict[str, Callable[[Path, Path], Iterator[Record]]] = {
    "pairs": _read_pairs,
    "folder": _read_folder,
    **dict.fromkeys(schemas.KARPATHY, _read_pairs),
}


def pictures_below(folder: str | Path) -> Iterator[tuple[str, str | None]]:
    """Pictures in a folder and its subfolders, linked ones too, by their endings, in the order of their paths.

    With each the text file beside it, if there is one.
    """
    seen = set()
    for directory, subfolders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(directory)) in seen:  # a link to a folder above
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        present = set(names)
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in PICTURES:
                text = sidecar_of(name, present.__contains__)
                yield os.path.join(directory, name), text and os.path.join(directory, text)


def sidecar_of(picture: str, exists: Callable[[str], bool] = os.path.isfile) -> str | None:
    """The text file beside a picture, if there is one."""
    stem = os.path.splitext(picture)[0]
    return next(filter(exists, (stem + ending for ending in SIDECARS)), None)


def sidecar_text(path: Path) -> str:
    """The caption in the text file beside a picture; ValueError if it is empty or not text."""
    try:
        text = " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}).") from error
    if not text:
        raise ValueError(
            f"{path}: the caption is empty. Write one, or remove the file to leave the picture out."
        )
    return text


def read_captions(path: Path) -> Iterator[str]:
    """The "caption" (a text or a list of texts) of each entry of a .json or .jsonl file; the lines of any other file.

    Raises ValueError naming file and line for what is neither.
    """
    if path.suffix not in (".json", ".jsonl"):
        with path.open(encoding="utf-8-sig") as lines:
            try:
                yield from filter(None, map(str.strip, lines))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 text ({error}).") from error
        return
    expected = 'Each entry needs {"caption": text}'
    for line, value in read_entries(path, expected):
        found = value.get("caption") if isinstance(value, dict) else None
        texts = found if isinstance(found, list) else [found]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f'{path}:{line}: "caption" is missing or not text. {expected}.')
        yield from texts
