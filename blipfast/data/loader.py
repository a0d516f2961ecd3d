"""The training loader: pairs in a random order that is the same on any number of ranks and workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from blipfast.config import DataConfig, TrainConfig
from blipfast.data.batches import BROKEN, AugmentText, BatchMaker, MicroBatchLoader
from blipfast.data.pairs import PairsDataset
from blipfast.data.sampling import mix, permutation
from blipfast.data.shards import ShardLoader, is_shards


def build_train_loader(
    data: DataConfig,
    train: TrainConfig,
    transform: Callable,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    augment_text: AugmentText | None = None,
    dataset: Dataset | None = None,
) -> MicroBatchLoader:
    """The loader a config describes: a `ShardLoader` for tar shards, a `TrainLoader` for everything else.

    Reads and checks all annotations; a task that has read its own gives them as `dataset`.
    Raises FileNotFoundError or ValueError naming what is wrong and what to do.
    """
    order = dict(
        seed=seed,
        rank=rank,
        world_size=world_size,
        accumulation=train.accumulation,
        workers=data.workers,
        augment_text=augment_text,
    )
    if dataset is not None:
        return TrainLoader(dataset, transform, train.batch_size, cache_images=data.cache_images, **order)
    if not data.train:
        raise ValueError("data.train is empty: name at least one .json, .jsonl, folder or set of shards.")
    text = dict(clean_captions=data.clean_captions, max_words=data.max_words, prompt=data.prompt)
    shards = [source for source in data.train if data.format == "shards" or is_shards(source)]
    if shards:
        if len(shards) < len(data.train) or data.format not in ("auto", "shards"):
            raise ValueError(f"data.train: {shards[0]} are shards; they cannot be mixed with other formats.")
        return ShardLoader(
            shards, transform, train.batch_size, samples_per_epoch=data.samples_per_epoch, **order, **text
        )
    dataset = PairsDataset(data.train, data.image_root, format=data.format, **text)
    return TrainLoader(dataset, transform, train.batch_size, cache_images=data.cache_images, **order)


class TrainLoader(MicroBatchLoader):
    """Micro-batches of a map-style dataset, each epoch in a new order; see `MicroBatchLoader` for the contract.

    dataset: `len` and `[i] -> {"image": uint8 [3|4, H, W], "caption": str, "image_id": int}`, raising ValueError or
    OSError for a broken sample, which the next one replaces. A dataset of other samples (see `vqa` and `nlvr`, whose
    "image" is a tuple of two) brings `collate(samples) -> dict`, `text_key`, the key of its text, and perhaps
    `vary(sample, random.Random) -> sample`. transform: (image, rng) -> float32 [3, S, S].
    augment_text: (text, random.Random) -> text. Every random choice about a sample is a function of
    (seed, epoch, index). cache_images: decode every picture once, now, and keep it in memory that workers share.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        workers: int = 0,
        augment_text: AugmentText | None = None,
        cache_images: bool = False,
    ):
        maker = SampleMaker(dataset, transform, augment_text, seed)
        ranks = dict(rank=rank, world_size=world_size, accumulation=accumulation)
        super().__init__(maker, len(dataset), batch_size, workers=workers, **ranks)
        self.seed = seed
        if cache_images:
            maker.cache = PictureCache(dataset, maker.prepare)

    def items(self, epoch: int, micro_batches: np.ndarray) -> Iterator[list[int]]:
        order = permutation(len(self.maker.dataset), self.seed, epoch)
        for g in micro_batches:
            yield order[g * self.batch_size : (g + 1) * self.batch_size].tolist()


class SampleMaker(BatchMaker):
    """Makes micro-batches of a map-style dataset; items are its indices."""

    def __init__(self, dataset: Dataset, transform: Callable, augment_text: AugmentText | None, seed: int):
        super().__init__(transform, augment_text, seed)
        self.dataset = dataset
        self.cache: PictureCache | None = None
        self.text_key = getattr(dataset, "text_key", self.text_key)

    def read(self, item: int) -> dict[str, Any]:
        if self.cache is None:
            sample = self.dataset[item]
            image = sample["image"]
            prepared = tuple(map(self.prepare, image)) if isinstance(image, tuple) else self.prepare(image)
            return {**sample, "image": prepared, "index": item}
        of = self.dataset.picture_of[item]
        image = tuple(self.cache[picture] for picture in of) if of.ndim else self.cache[of]
        return {**self.dataset.annotation(item), "image": image, "index": item}

    def following(self, item: int) -> int:
        return (item + 1) % len(self.dataset)

    def vary(self, sample: dict[str, Any], seed: int) -> dict[str, Any]:
        sample = super().vary(sample, seed)
        own = getattr(self.dataset, "vary", None)
        return own(sample, Random(mix(seed, 1))) if own else sample

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return getattr(self.dataset, "collate", super().collate)(samples)


class PictureCache:
    """All distinct pictures of a dataset, decoded and prepared, in one uint8 tensor that forked workers share.

    The dataset has `pictures`, `load_picture`, `picture_of` and `annotation`, as `PairsDataset` does.
    `[picture]` is a view, uint8 [C, H, W]; a broken picture raises the ValueError that decoding it raised.
    """

    def __init__(self, dataset: Dataset, prepare: Callable[[Tensor], Tensor]):
        self.errors: dict[int, str] = {}

        def decode(picture: int) -> Tensor:
            try:
                return prepare(dataset.load_picture(picture))
            except BROKEN as error:
                self.errors[picture] = str(error)
                return torch.empty(0, 0, 0, dtype=torch.uint8)

        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:  # decoders let go of Python's lock
            pictures = list(pool.map(decode, range(dataset.pictures)))
        self._shapes = [tuple(picture.shape) for picture in pictures]
        self._ends = np.cumsum([0] + [picture.numel() for picture in pictures])
        self._pixels = torch.cat([picture.flatten() for picture in pictures])

    def __getitem__(self, picture: int) -> Tensor:
        if picture in self.errors:
            raise ValueError(self.errors[picture])
        return self._pixels[self._ends[picture] : self._ends[picture + 1]].view(self._shapes[picture])
