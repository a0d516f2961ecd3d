"""Evaluation views, and COCO and Flickr30k in Karpathy's format. Nothing is downloaded: say where the files are."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from blipfast.config import DataConfig
from blipfast.data.pairs import PairsDataset
from blipfast.data.readers import KARPATHY_FILES

_NUMBER_AT_THE_END = re.compile(r"(?:^|_)(\d+)$")

logger = logging.getLogger(__name__)


class PicturesView(Dataset):
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
        try:
            image = self._pairs.load_picture(self._pictures[i])
        except ValueError as error:
            logger.warning("A grey square stands for a picture that cannot be read: %s", error)
            image = torch.full((3, 64, 64), 128, dtype=torch.uint8)
        return self.transform(image, None) if self.transform else image


class RetrievalView(PicturesView):
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


class CaptionView(PicturesView):
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
    karpathy = data.format in KARPATHY_FILES
    return RetrievalView(
        data.val if split == "val" else data.test,
        data.test_image_root or data.image_root,
        transform,
        format=data.format if karpathy else "auto",
        split=split,
        clean_captions=data.clean_captions,
        max_words=data.max_words,
        share_captions=not karpathy,
    )


def coco_karpathy_train(
    image_root: str, ann_root: str, max_words: int = 30, prompt: str = ""
) -> PairsDataset:
    """COCO's training pairs, from ann_root/coco_karpathy_train.json."""
    return PairsDataset(ann_root, image_root, format="coco", max_words=max_words, prompt=prompt)


def coco_karpathy_caption_eval(
    transform: Callable, image_root: str, ann_root: str, split: str
) -> CaptionView:
    """COCO's captioning view, from ann_root/coco_karpathy_{val,test}.json."""
    return CaptionView(ann_root, image_root, transform, format="coco", split=split)


def coco_karpathy_retrieval_eval(
    transform: Callable, image_root: str, ann_root: str, split: str, max_words: int = 30
) -> RetrievalView:
    """COCO's retrieval view, from ann_root/coco_karpathy_{val,test}.json."""
    return RetrievalView(ann_root, image_root, transform, format="coco", split=split, max_words=max_words)


def flickr30k_train(image_root: str, ann_root: str, max_words: int = 30, prompt: str = "") -> PairsDataset:
    """Flickr30k's training pairs, from ann_root/flickr30k_train.json."""
    return PairsDataset(ann_root, image_root, format="flickr30k", max_words=max_words, prompt=prompt)


def flickr30k_retrieval_eval(
    transform: Callable, image_root: str, ann_root: str, split: str, max_words: int = 30
) -> RetrievalView:
    """Flickr30k's retrieval view, from ann_root/flickr30k_{val,test}.json."""
    return RetrievalView(
        ann_root, image_root, transform, format="flickr30k", split=split, max_words=max_words
    )
