"""Image-text pairs from any annotated source, as one map-style dataset that costs workers no memory."""

from __future__ import annotations

import hashlib
import os
from array import array
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from blipfast.data.images import load_image
from blipfast.data.readers import read_source
from blipfast.text import pre_caption, with_prompt

_LOOKED_UP = 16  # pictures whose existence is checked on opening


class PackedStrings:
    """Strings in one bytearray, so that forked workers share its memory for good.

    (A list of str is copied page by page into every worker, as reference counts are touched.)
    """

    def __init__(self) -> None:
        self._text, self._ends = bytearray(), array("q", [0])

    def append(self, string: str) -> None:
        self._text += string.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"{i} of {len(self)}")
        return self._text[self._ends[i] : self._ends[i + 1]].decode("utf-8", "surrogatepass")


class PairsDataset(Dataset):
    """Pairs of one source or several: `[i] -> {"image": uint8 [3|4, H, W], "caption", "image_id", "path"}`.

    sources: JSON lists, JSONL files, or folders with captions beside the pictures (see `readers.read_source`). An
    entry with several captions gives a pair for each. `image_id` counts 0, 1, 2, ...; pairs share one if they share
    the picture's path, or the image_id given in their source. All lines are checked here, on opening; pictures
    are decoded when asked for.
    clean_captions: apply official `pre_caption`, which also cuts to `max_words`. prompt: put before each caption.
    Raises FileNotFoundError or ValueError, naming file and line, what was expected and what to do.
    """

    def __init__(
        self,
        sources: str | list[str],
        image_root: str = "",
        *,
        format: str = "auto",
        clean_captions: bool = True,
        max_words: int = 30,
        prompt: str = "",
        split: str = "train",
    ):
        sources = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
        if not sources:
            raise ValueError("data.train is empty: name at least one .json, .jsonl, folder or set of shards.")
        self.clean_captions, self.max_words, self.prompt = clean_captions, max_words, prompt
        self._paths, self._captions = PackedStrings(), PackedStrings()
        pictures, given = array("Q"), array("Q")  # hashes of each pair's path and of the id its source gives
        for source in map(os.fspath, sources):
            start = len(self)
            for record in read_source(source, image_root, format, split):
                picture = _hash(record.image)
                own = picture if record.image_id is None else _hash(f"{source}\0{record.image_id!r}")
                for caption in record.captions:
                    self._paths.append(record.image)
                    self._captions.append(caption)
                    pictures.append(picture)
                    given.append(own)
            self._check_source(source, start, image_root)
        _, first, self.picture_of = np.unique(
            np.frombuffer(pictures, np.uint64), return_index=True, return_inverse=True
        )
        self._first = first  # a pair that shows each distinct picture
        self.image_ids = _common_ids(self.picture_of, np.frombuffer(given, np.uint64))

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": load_image(self._paths[i]), **self.annotation(i)}

    def annotation(self, i: int) -> dict[str, Any]:
        """Pair `i` without its picture."""
        return {"caption": self.caption(i), "image_id": int(self.image_ids[i]), "path": self._paths[i]}

    def caption(self, i: int) -> str:
        """Caption of pair `i`, cleaned, with the prompt."""
        caption = self._captions[i]
        caption = pre_caption(caption, self.max_words) if self.clean_captions else caption
        return with_prompt(self.prompt, caption)

    def path(self, i: int) -> str:
        """Path of the picture of pair `i`."""
        return self._paths[i]

    @property
    def pictures(self) -> int:
        """Number of distinct picture files; `picture_of` [len] says which of them each pair shows."""
        return len(self._first)

    def load_picture(self, picture: int) -> Tensor:
        """Decode distinct picture 0 <= picture < `pictures`."""
        return load_image(self._paths[int(self._first[picture])])

    def _check_source(self, source: str, start: int, image_root: str) -> None:
        """Pairs from `start` on are of `source`: there must be some, and some of their pictures must exist."""
        if start == len(self):
            raise ValueError(f"{source}: there are no pairs in it.")
        places = np.unique(np.linspace(start, len(self) - 1, _LOOKED_UP).astype(int))
        if not any(os.path.exists(self._paths[i]) for i in places):
            hint = f"data.image_root is {image_root!r}" if image_root else "data.image_root is not set"
            raise FileNotFoundError(
                f"{source}: none of {len(places)} pictures looked up exists, the first being "
                f"{self._paths[start]}; {hint}."
            )


def _hash(text: str) -> int:
    """64 bits that are the same in every process (Python's own hash is not)."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def _common_ids(pictures: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Number the groups of pairs linked by equal `pictures` or equal `given`, in order of appearance. int64 [N]."""
    links = [np.unique(keys, return_inverse=True)[1] for keys in (pictures, given)]
    label = np.arange(len(pictures))
    while True:  # every group takes its smallest label, until the two ways of grouping agree
        before = label
        for link in links:
            smallest = np.full(link.max() + 1, len(label))
            np.minimum.at(smallest, link, label)
            label = smallest[link]
        if np.array_equal(before, label):
            return np.unique(label, return_inverse=True)[1]
