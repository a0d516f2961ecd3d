"""Micro-batches made by workers, in an order fixed beforehand: what `loader` and `shards` have in common."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blipfast.data.sampling import mix, sample_seed
from blipfast.data.workers import outlive_signals

BROKEN = (ValueError, OSError)  # what reading a damaged sample raises
_TRIES = 1000  # neighbours looked at in place of a broken sample
_PREFETCH = 4  # micro-batches a worker makes ahead

logger = logging.getLogger(__name__)

AugmentText = Callable[[str, Random], str]


class BatchMaker(Dataset, ABC):
    """Turns a key, (epoch, items), into a micro-batch; in whatever process, always the same one.

    A transform may offer `prepare(image)` (the deterministic part) and `batch(prepared, seeds)`, see
    `strong.StrongTransform`; otherwise it is called as transform(image, rng), picture by picture.
    """

    text_key = "caption"  # what `augment_text` changes

    def __init__(self, transform: Callable, augment_text: AugmentText | None, seed: int):
        self.transform, self.augment_text, self.seed = transform, augment_text, seed
        self.prepare: Callable[[Tensor], Tensor] = getattr(transform, "prepare", _as_it_is)

    @abstractmethod
    def read(self, item: Any) -> dict[str, Any]:
        """The sample `item`: "index", "image" (prepared; or a tuple of several), and the rest. Raises one of BROKEN."""

    @abstractmethod
    def following(self, item: Any) -> Any:
        """The item that stands in for `item` if that is broken."""

    def __getitem__(self, key: tuple[int, Sequence[Any]]) -> dict[str, Any]:
        epoch, items = key
        broken: dict[str, str] = {}
        samples = [self._read_or_next(item, broken) for item in items]
        seeds = [sample_seed(self.seed, epoch, sample["index"]) for sample in samples]
        samples = [self.vary(sample, seed) for sample, seed in zip(samples, seeds, strict=True)]
        return {
            "image": self._pictures([sample["image"] for sample in samples], seeds),
            **self.collate(samples),
            "index": torch.tensor([sample["index"] for sample in samples]),
            "broken": broken,
        }

    def vary(self, sample: dict[str, Any], seed: int) -> dict[str, Any]:
        """The sample after the random changes that are not the transform's."""
        if self.augment_text:
            text = self.augment_text(sample[self.text_key], Random(mix(seed)))
            sample = {**sample, self.text_key: text}
        return sample

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """What a batch holds beside its pictures."""
        return {
            "caption": [sample["caption"] for sample in samples],
            "image_id": torch.tensor([sample["image_id"] for sample in samples]),
        }

    def _read_or_next(self, item: Any, broken: dict[str, str]) -> dict[str, Any]:
        for _ in range(_TRIES):
            try:
                return self.read(item)
            except BROKEN as error:
                broken[str(item)] = str(error)
                item = self.following(item)
        reason = next(iter(broken.values()))
        raise ValueError(f"{len(broken)} samples in a row cannot be read; the first: {reason}")

    def _pictures(self, images: list[Tensor | tuple[Tensor, ...]], seeds: list[int]) -> Tensor:
        """Pictures [B, 3, S, S]; of samples with two each, all first ones, then all second ones: [2 B, 3, S, S]."""
        if not isinstance(images[0], tuple):
            return self._transformed(images, seeds)
        places = enumerate(zip(*images, strict=True))
        parts = [
            self._transformed(list(part), [mix(seed, place) for seed in seeds]) for place, part in places
        ]
        return torch.cat(parts)

    def _transformed(self, images: list[Tensor], seeds: list[int]) -> Tensor:
        if hasattr(self.transform, "batch"):
            return self.transform.batch(images, seeds)
        rng = torch.Generator()
        return torch.stack(
            [self.transform(image, rng.manual_seed(seed)) for image, seed in zip(images, seeds, strict=True)]
        )


class MicroBatchLoader(ABC):
    """Iterates over the micro-batches of one rank. Every rank gets the same number of them.

    The order contract: an epoch is cut into global micro-batches g = 0, 1, ... of `batch_size`. In optimizer step s,
    rank r's micro-batch m is g = s * accumulation * world_size + m * world_size + r. What g holds depends on
    (seed, epoch, g) only, so 1 rank with accumulation 2 sees what 2 ranks with accumulation 1 see.
    """

    def __init__(
        self,
        maker: BatchMaker,
        samples: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        workers: int = 0,
    ):
        for name, value in (
            ("batch_size", batch_size),
            ("accumulation", accumulation),
            ("world_size", world_size),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not exist among {world_size} ranks.")
        step = batch_size * accumulation * world_size
        if samples < step:
            raise ValueError(
                f"More ranks than data: a step takes {step} samples (train.batch_size {batch_size} x accumulation "
                f"{accumulation} x {world_size} ranks), but there are {samples}. Lower one of the three."
            )
        self.maker, self.batch_size = maker, batch_size
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation
        self.steps = samples // step
        self.broken: dict[str, str] = {}  # every sample that could not be read, and why
        self._keys = _Keys()
        self._batches = DataLoader(
            maker,
            batch_size=None,  # a key already stands for a whole micro-batch
            sampler=self._keys,
            num_workers=workers,
            prefetch_factor=_PREFETCH if workers else None,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=outlive_signals,
            generator=torch.Generator(),  # or it would draw from the global one
        )

    def __len__(self) -> int:
        """Optimizer steps in an epoch; what does not fill a step is left out of it."""
        return self.steps

    @abstractmethod
    def items(self, epoch: int, micro_batches: np.ndarray) -> Iterator[Sequence[Any]]:
        """The items of each of the given global micro-batches (increasing int64) of an epoch."""

    def iterate(self, epoch: int, start_step: int = 0) -> Iterator[dict[str, Any]]:
        """Yield this rank's micro-batches of an epoch from an optimizer step on, `accumulation` of them a step.

        {"image": float32 [B, 3, S, S], "index": int64 [B], and what `BatchMaker.collate` adds: for pairs
        "caption": list of B strings, "image_id": int64 [B]}.
        Starting in the middle costs nothing: what came before is not read. A broken sample is replaced by the one
        that follows it, noted in `broken`, and named in the log once.
        """
        per_step = self.accumulation * self.world_size
        mine = np.arange(start_step * per_step + self.rank, self.steps * per_step, self.world_size)
        keys = ((epoch, items) for items in self.items(epoch, mine))
        self._keys.upcoming = keys
        try:
            for batch in self._batches:
                for item, reason in batch.pop("broken").items():
                    if item not in self.broken:
                        self.broken[item] = reason
                        logger.warning("Skipped, %d broken so far: %s", len(self.broken), reason)
                yield batch
        finally:
            keys.close()  # it refers to this loader, and workers are slow to leave what the cycle collector takes


class _Keys:
    """Sampler whose keys are set anew for each epoch, so that workers may outlive one."""

    upcoming: Iterator[tuple[int, Any]] = iter(())

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self.upcoming


def _as_it_is(image: Tensor) -> Tensor:
    return image
