"""NoCaps: pictures to describe whose captions are kept by the benchmark's server, or, for val, in its own file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from blipfast.data.images import load_or_grey
from blipfast.data.pictures import Pictures, root_setting
from blipfast.data.readers import checked_entries, first_character
from blipfast.data.schemas import FORMATS, official_file


class NoCapsView:
    """The pictures of one split: `image_ids`, and picture(i), uint8 [3|4, H, W].

    source: official BLIP's nocaps_{val,test}.json, a list of {"image", "img_id"}, or the folder that holds both; or
    the benchmark's own file, {"images": [{"id", "file_name", "domain"}], "annotations": [{"image_id", "caption"}]},
    which gives `references` {image_id: captions} and `domains` {image_id: "in-domain" | "near-domain" | ...} too.
    Pictures lie below `image_root`, or else beside the file. Raises FileNotFoundError or ValueError naming file, line
    and key.
    """

    def __init__(self, source: str, image_root: str = "", split: str = "val"):
        path = official_file(Path(source).expanduser(), "nocaps", split)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file. Check data.val and data.test.")
        root = Path(image_root).expanduser() if image_root else path.parent
        self._pictures = Pictures()
        self.image_ids: list[int] = []
        self.references: dict[int, list[str]] = {}
        self.domains: dict[int, str] = {}
        if first_character(path) == "{":
            self._read_benchmark(path, root)
        else:
            self._read_list(path, root)
        if not len(self):
            raise ValueError(f"{path}: there are no pictures in it.")
        if len(set(self.image_ids)) < len(self) or len(self._pictures) < len(self):
            raise ValueError(
                f"{path}: a picture or a number comes twice; each picture has a number of its own."
            )
        self._pictures.check(str(path), np.arange(len(self)), root_setting("data.image_root", image_root))

    def __len__(self) -> int:
        return len(self.image_ids)

    def picture(self, i: int) -> Tensor:
        """Picture `i`; one that cannot be read is named in the log and stands as a grey square."""
        return load_or_grey(self._pictures.load, i)

    def _read_list(self, path: Path, root: Path) -> None:
        for value, entry in checked_entries(path, "nocaps"):
            self._pictures.add(str(root / entry.pictures[0]))
            self.image_ids.append(int(value["img_id"]))

    def _read_benchmark(self, path: Path, root: Path) -> None:
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            for image in content["images"]:
                self.image_ids.append(int(image["id"]))
                self._pictures.add(str(_find(root, image["file_name"])))
                self.domains[self.image_ids[-1]] = image.get("domain", "")
            for annotation in content.get("annotations", []):
                self.references.setdefault(int(annotation["image_id"]), []).append(annotation["caption"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f'{path}: {type(error).__name__} {error}. Expected {{"images": [{{"id", "file_name"}}], "annotations": '
                f'[{{"image_id", "caption"}}]}}, or a list: {FORMATS["nocaps"].expected}.'
            ) from None
        if self.references and (bare := set(self.image_ids) - self.references.keys()):
            raise ValueError(f'{path}: the picture number {min(bare)} has no caption in "annotations".')


def _find(root: Path, name: str) -> Path:
    """The benchmark's files name pictures without the folder of their split."""
    places = [root / name, root / "val" / name, root / "test" / name]
    return next((place for place in places if place.exists()), places[0])
