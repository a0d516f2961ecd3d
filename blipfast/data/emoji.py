"""The emoji set that ships with the package: pictures by several vendors with their names, for the demo.

`assets/emoji/` holds one WebP sheet a vendor (RGBA, `COLUMNS` cells of `CELL` px a row), `vendors.json` (who drew
them, licence, package) and `emoji.jsonl`, one emoji a line: {"name", "slug", "group", "subgroup", "tags", "vendors"}.
A vendor's cells stand in the order of the lines that list it. `blipfast.data.emoji_build` makes these files.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "emoji"
CELL = 64  # pixels
COLUMNS = 40
CONCRETE = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
UNSEEN = "fluent"
DRAWN_BY = 3  # a name is tested if at least so many of the vendors trained on have drawn it
MARKER = "emoji-set.json"  # what unpack() leaves in a folder to know it again


def unpack(directory: str | os.PathLike, unseen: str = UNSEEN, groups: str = "concrete") -> Path:
    """Write the set into `directory`: pictures, and annotations for training on all vendors but `unseen`.

    `{vendor}/{slug}.png`: RGBA pictures, 64 px, transparent around the drawing, which fills the square.
    `train.jsonl`: {"image", "caption", "image_id", "tags", "vendor"} a line; pictures by every vendor that is not of
        the family of `unseen` (Noto's first design is no stranger to Noto). `groups` "concrete" takes animals, food,
        travel, activities and objects; "all" adds smileys, people, symbols and flags. `image_id` numbers the emoji,
        so pictures of one name share it.
    `test.jsonl`: the same keys; the drawings by `unseen` of the concrete names that at least `DRAWN_BY` training
        vendors have drawn. No caption comes twice, and each is a caption in training.
    Counts for unseen="fluent": 3,789 (concrete) or 6,880 (all) training pictures, 651 test pictures.

    Returns the folder. Where the same set lies already nothing is done; another set made by this function is replaced,
    other files beside it stay.
    The folder appears complete or not at all. Raises ValueError for an unknown vendor or group, FileExistsError if
    `directory` holds something else.
    """
    if unseen not in vendors():
        raise ValueError(
            f"unseen={unseen!r} is not a vendor of the emoji set; it has {', '.join(vendors())}."
        )
    if groups not in ("concrete", "all"):
        raise ValueError(f"groups={groups!r} is unknown; expected 'concrete' or 'all'.")
    directory = Path(directory)
    marker = {"unseen": unseen, "groups": groups, "set": _fingerprint()}
    if _same_set(directory, marker):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        fresh = Path(scratch, "fresh")
        _write(fresh, unseen, groups)
        (fresh / MARKER).write_text(json.dumps(marker), encoding="utf-8")
        old = Path(scratch, "old")
        if directory.exists():
            directory.rename(old)
        fresh.rename(directory)
        for path in old.glob("*"):  # what others put there, such as a tokenizer
            if path.is_file() and not (directory / path.name).exists():
                path.rename(directory / path.name)
    return directory


def vendors() -> dict[str, dict[str, Any]]:
    """vendors.json by name: family, title, author, licence and url of each set, its npm package and version."""
    return {
        vendor["name"]: vendor for vendor in json.loads((ASSETS / "vendors.json").read_text(encoding="utf-8"))
    }


def read_index() -> list[dict[str, Any]]:
    """The lines of emoji.jsonl."""
    return [json.loads(line) for line in (ASSETS / "emoji.jsonl").read_text(encoding="utf-8").splitlines()]


def pictures(vendor: str) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    """Every emoji of a vendor, as its line in emoji.jsonl and an RGBA picture of `CELL` px."""
    with Image.open(ASSETS / f"{vendor}.webp") as opened:
        sheet = opened.convert("RGBA")
    for place, emoji in enumerate(line for line in read_index() if vendor in line["vendors"]):
        left, top = place % COLUMNS * CELL, place // COLUMNS * CELL
        yield emoji, sheet.crop((left, top, left + CELL, top + CELL))


def split(
    unseen: str = UNSEEN, groups: str = "concrete"
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of train.jsonl and of test.jsonl, as `unpack` describes them."""
    known = vendors()
    seen = [name for name, vendor in known.items() if vendor["family"] != known[unseen]["family"]]
    train, test = [], []
    for image_id, emoji in enumerate(read_index()):
        concrete = emoji["group"] in CONCRETE
        drawn_by = [vendor for vendor in seen if vendor in emoji["vendors"]]
        if concrete or groups == "all":
            train += [_line(emoji, vendor, image_id) for vendor in drawn_by]
        if concrete and unseen in emoji["vendors"] and len(drawn_by) >= DRAWN_BY:
            test.append(_line(emoji, unseen, image_id))
    return train, test


def _line(emoji: dict[str, Any], vendor: str, image_id: int) -> dict[str, Any]:
    image = f"{vendor}/{emoji['slug']}.png"
    return {
        "image": image,
        "caption": emoji["name"],
        "image_id": image_id,
        "tags": emoji["tags"],
        "vendor": vendor,
    }


def _write(folder: Path, unseen: str, groups: str) -> None:
    lines = dict(zip(("train", "test"), split(unseen, groups), strict=True))
    folder.mkdir()
    for name, part in lines.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    wanted = {line["image"] for part in lines.values() for line in part}
    for vendor in sorted({image.split("/")[0] for image in wanted}):
        (folder / vendor).mkdir()
        for emoji, picture in pictures(vendor):
            image = f"{vendor}/{emoji['slug']}.png"
            if image in wanted:
                framed(picture).save(folder / image, compress_level=1)


def framed(picture: Image.Image) -> Image.Image:
    """The drawing of an RGBA picture, enlarged to fill its square but for a margin of 3 %.

    Vendors leave margins of their own, which say nothing about what is drawn.
    """
    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox()
    if box is None:
        return picture
    side = round(max(box[2] - box[0], box[3] - box[1]) * 1.06)
    centre_x, centre_y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    left, top = round(centre_x - side / 2), round(centre_y - side / 2)
    return picture.crop((left, top, left + side, top + side)).resize(picture.size, Image.Resampling.LANCZOS)


def _same_set(directory: Path, marker: dict[str, str]) -> bool:
    """Whether `directory` holds this very set; False if it is free to be written."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    try:
        return json.loads((directory / MARKER).read_text(encoding="utf-8")) == marker
    except (OSError, ValueError):
        raise FileExistsError(
            f"{directory} exists and is not an emoji set made by blipfast; name a folder that is new or empty."
        ) from None


def _fingerprint() -> str:
    """Changes whenever the shipped files or this file do."""
    code = Path(__file__).read_bytes()
    return hashlib.sha256((ASSETS / "SHA256SUMS").read_bytes() + code).hexdigest()
