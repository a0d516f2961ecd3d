"""The pictures of an annotated set, each file numbered once however many annotations share it."""

from __future__ import annotations

import os

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from blipfast.data.images import load_image
from blipfast.data.pairs import PackedStrings

_LOOKED_UP = 16  # pictures whose existence is checked on opening


class Pictures:
    """Distinct picture files in order of appearance, kept so that forked workers share the memory."""

    def __init__(self) -> None:
        self._paths = PackedStrings()
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._paths)

    def add(self, path: str) -> int:
        """The number of the picture at `path`, a new one if it was not seen before."""
        number = self._numbers.setdefault(path, len(self._paths))
        if number == len(self._paths):
            self._paths.append(path)
        return number

    def path(self, number: int) -> str:
        return self._paths[number]

    def load(self, number: int) -> Tensor:
        """Decode a picture to uint8 [3|4, H, W]; ValueError if that fails."""
        return load_image(self._paths[number])

    def complete(self) -> None:
        """No more pictures will be added: forget what only adding needs."""
        self._numbers.clear()

    def check(self, source: str, numbers: np.ndarray, settings: str) -> None:
        """Raise FileNotFoundError if, of the pictures `numbers` that `source` names, none looked up exists.

        settings: what to set right, such as "data.image_root is 'coco'".
        """
        places = np.unique(numbers[np.linspace(0, len(numbers) - 1, _LOOKED_UP).astype(int)])
        if not any(os.path.exists(self._paths[number]) for number in places):
            raise FileNotFoundError(
                f"{source}: none of {len(places)} pictures looked up exists, the first being "
                f"{self._paths[int(places[0])]}; {settings}."
            )


class PicturesDataset(Dataset):
    """Annotations of pictures; several may share one. A subclass fills `_pictures` and `picture_of`.

    picture_of: which picture each annotation is about, int64 [len], or [len, 2] for two pictures each.
    """

    _pictures: Pictures
    picture_of: np.ndarray

    @property
    def pictures(self) -> int:
        """Number of distinct pictures."""
        return len(self._pictures)

    def load_picture(self, picture: int) -> Tensor:
        """Decode distinct picture 0 <= picture < `pictures`; ValueError if that fails."""
        return self._pictures.load(picture)


def root_setting(name: str, root: str) -> str:
    """What a message says about the folder of pictures that a setting of `data` names."""
    return f"data.{name} is {root!r}" if root else f"data.{name} is not set"
