"""Pictures to evaluate on, in batches: each of a data set's distinct pictures by its number."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from blipfast.data.transforms import Transform
from blipfast.data.workers import outlive_signals

log = logging.getLogger("blipfast")


class PictureView(Dataset):
    """`[picture] -> float32 [3, S, S]` of a data set with `pictures` and `load_picture`, such as `VQADataset`.

    A picture that cannot be read is named in the log and stands as a grey square, so that the evaluation goes on.
    """

    def __init__(self, dataset: Any, transform: Transform):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return self.dataset.pictures

    def __getitem__(self, picture: int) -> Tensor:
        try:
            image = self.dataset.load_picture(picture)
        except ValueError as error:
            log.warning("A grey square stands for a picture that cannot be read: %s", error)
            image = torch.full((3, 64, 64), 128, dtype=torch.uint8)
        return self.transform(image, None)


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
