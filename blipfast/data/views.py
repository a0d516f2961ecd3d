"""Views to evaluate on: the distinct pictures of a set, each once, with what they are judged by; and their batches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from blipfast.config import DataConfig
from blipfast.data.images import load_or_grey
from blipfast.data.pairs import PairsDataset
from blipfast.data.schemas import KARPATHY
from blipfast.data.transforms import Transform
from blipfast.data.workers import outlive_signals

_NUMBER_AT_THE_END = re.compile(r"(?:^|_)(\d+)$")


class PictureView(Dataset):
    """`[picture] -> float32 [3, S, S]` of a data set with `pictures` and `load_picture`, such as `VQADataset`.

    A picture that cannot be read is named in the log and stands as a grey square, so that the evaluation goes on.
    """

    def __init__(self, dataset: Any, transform: Transform):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return self.dataset.pictures

    def __getitem__(self, picture: int) -> Tensor:
        return self.transform(load_or_grey(self.dataset.load_picture, picture), None)


class AnnotatedView(Dataset):
    """The distinct pictures of an annotated source, in its order, each with all of its captions.

    source, image_root, format: as for `PairsDataset`. transform: (image, None) -> Tensor; None hands out the decoded
    picture, uint8 [3|4, H, W]. A picture that cannot be read is named in the log and stands as a grey square, so that
    it counts as a miss and the evaluation goes on.
    """

    def __init__(
        self,
        source: str,
        image_root: str = "",
        transform: Callable | None = None,
        *,
        format: str = "auto",
        split: str = "test",
        clean_captions: bool = True,
        max_words: int = 30,
    ):
        pairs = PairsDataset(
            source, image_root, format=format, split=split, clean_captions=clean_captions, max_words=max_words
        )
        self.transform = transform
        of_path: dict[int, int] = {}
        self.image: list[str] = []
        self.captions: list[list[str]] = []
        for i, picture in enumerate(pairs.picture_of.tolist()):
            if picture not in of_path:
                of_path[picture] = len(self.image)
                self.image.append(pairs.path(i))
                self.captions.append([])
            self.captions[of_path[picture]].append(pairs.caption(i))
        self._pairs, self._pictures = pairs, list(of_path)

    def __len__(self) -> int:
        return len(self.image)

    def picture(self, i: int) -> Tensor:
        """Picture `i`, through the transform."""
        image = load_or_grey(self._pairs.load_picture, self._pictures[i])
        return self.transform(image, None) if self.transform else image


class RetrievalView(AnnotatedView):
    """`[i] -> (picture, i)`, and what retrieval is scored by, as in official BLIP.

    image: paths. text: captions. img2txt: {picture: its texts}. txt2img: {text: its picture}, or with `share_captions`
    {text: all its pictures}, where equal captions are one text and finding any of its pictures is right.
    """

    def __init__(self, *args, share_captions: bool = False, **settings):
        super().__init__(*args, **settings)
        self.text: list[str] = []
        self.img2txt: dict[int, list[int]] = {}
        self.txt2img: dict[int, int] | dict[int, list[int]] = {}
        known: dict[str, int] = {}
        for i, captions in enumerate(self.captions):
            self.img2txt[i] = []
            for caption in dict.fromkeys(captions) if share_captions else captions:
                text = known.get(caption, len(self.text)) if share_captions else len(self.text)
                if text == len(self.text):
                    self.text.append(caption)
                    known[caption] = text
                self.img2txt[i].append(text)
                if share_captions:
                    self.txt2img.setdefault(text, []).append(i)
                else:
                    self.txt2img[text] = i

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.picture(i), i


class CaptionView(AnnotatedView):
    """`[i] -> (picture, image_id)`, and `references`: {image_id: its captions}.

    image_id is the number at the end of the file name, as official BLIP takes it from COCO's; where the names do not
    give every picture one of its own, it is the picture's place.
    """

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        numbers = [_NUMBER_AT_THE_END.search(Path(path).stem) for path in self.image]
        ids = [int(number[1]) for number in numbers if number]
        self.image_ids = ids if len(set(ids)) == len(self) else list(range(len(self)))
        self.references = dict(zip(self.image_ids, self.captions, strict=True))

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.picture(i), self.image_ids[i]


def open_retrieval(data: DataConfig, transform: Callable | None = None, split: str = "test") -> RetrievalView:
    """The view of a config's `data.val` or `data.test`; equal captions are shared unless the format is Karpathy's."""
    karpathy = data.format in KARPATHY
    return RetrievalView(
        getattr(data, split),
        data.root(split),
        transform,
        format=data.format if karpathy else "auto",
        split=split,
        clean_captions=data.clean_captions,
        max_words=data.max_words,
        share_captions=not karpathy,
    )


def in_batches(
    view: Dataset, places: Sequence[int], batch_size: int, workers: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of the items `places` of a view of tensors, in that order, with the places they are from."""
    loader = DataLoader(
        Subset(view, places),
        batch_size,
        num_workers=workers,
        worker_init_fn=outlive_signals,
        generator=torch.Generator(),  # or it would draw from the one that training uses
    )
    starts = range(0, len(places), batch_size)
    for start, batch in zip(starts, loader, strict=True):
        yield list(places[start : start + batch_size]), batch
