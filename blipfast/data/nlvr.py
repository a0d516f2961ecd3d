"""Statements about two pictures, true or false: NLVR2 and one's own, in official BLIP's JSON."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from blipfast.data.pairs import PackedStrings
from blipfast.data.pictures import Pictures, PicturesDataset, root_setting
from blipfast.data.readers import checked_entries
from blipfast.data.schemas import FORMATS
from blipfast.text import pre_caption

HIDDEN = -1  # a label that is not known
_OTHER_SIDE = {"left": "right", "right": "left"}


class NLVRDataset(PicturesDataset):
    """`[i] -> {"image": (first, second), each uint8 [3|4, H, W], "sentence", "label": 1 for true, 0 for false}`.

    sources: files of JSON or JSON lines with the official keys (see `schemas`). Pictures are relative to
    `image_root`, or else to the file's own folder.
    swap: the probability with which training exchanges the two pictures, and the words left and right (official:
    0.5). clean: apply official `pre_caption`, which also cuts to `max_words`.
    Raises FileNotFoundError or ValueError naming file, line and key.
    """

    text_key = "sentence"

    def __init__(
        self,
        sources: str | Sequence[str],
        image_root: str = "",
        *,
        split: str = "train",
        swap: float = 0.5,
        clean: bool = True,
        max_words: int = 40,
    ):
        sources = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
        if not sources:
            raise ValueError("data.train is empty: name at least one file of statements.")
        self.swap, self.clean, self.max_words = swap, clean, max_words
        self._pictures, self._sentences, self._identifiers = Pictures(), PackedStrings(), PackedStrings()
        labels, picture_of = array("b"), array("q")
        for source in sources:
            start, path = len(self), Path(source).expanduser()
            root = os.path.expanduser(image_root) or str(path.parent)
            for value, entry in checked_entries(path, "nlvr", split):
                picture_of.extend(self._pictures.add(os.path.join(root, name)) for name in entry.pictures)
                self._sentences.append(entry.texts[0])
                self._identifiers.append(str(value.get("identifier", len(labels))))
                label = value.get("label")  # hidden in NLVR2's second test set
                labels.append(HIDDEN if label is None else str(label).lower() == "true")
            if start == len(self):
                raise ValueError(f"{path}: there are no statements in it. {FORMATS['nlvr'].expected}.")
            numbers = np.array(picture_of[2 * start :])
            self._pictures.check(str(path), numbers, root_setting("image_root", image_root))
        self._pictures.complete()
        self.picture_of = np.array(picture_of).reshape(-1, 2)
        self.labels = np.array(labels)

    def __len__(self) -> int:
        return len(self._sentences)

    def __getitem__(self, i: int) -> dict[str, Any]:
        first, second = self.picture_of[i].tolist()
        return {"image": (self.load_picture(first), self.load_picture(second)), **self.annotation(i)}

    def annotation(self, i: int) -> dict[str, Any]:
        """Sample `i` without its pictures."""
        return {"sentence": self.sentence(i), "label": int(self.labels[i])}

    @property
    def hidden(self) -> bool:
        """Whether the labels of some statements are not known."""
        return bool((self.labels == HIDDEN).any())

    def sentence(self, i: int) -> str:
        """Statement `i`, cleaned."""
        sentence = self._sentences[i]
        return pre_caption(sentence, self.max_words) if self.clean else sentence

    def identifier(self, i: int) -> str:
        """NLVR2's identifier of statement `i`, else its place."""
        return self._identifiers[i]

    def vary(self, sample: dict[str, Any], rng: Random) -> dict[str, Any]:
        """The training sample with its pictures exchanged, with probability `swap`."""
        if rng.random() >= self.swap:
            return sample
        first, second = sample["image"]
        return {**sample, "image": (second, first), "sentence": other_side(sample["sentence"])}

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Sentences, and their labels as int64 [B]."""
        return {
            "sentence": [sample["sentence"] for sample in samples],
            "label": torch.tensor([sample["label"] for sample in samples]),
        }


def other_side(sentence: str) -> str:
    """The sentence with the words left and right exchanged."""
    return " ".join(_OTHER_SIDE.get(word, word) for word in sentence.split(" "))
