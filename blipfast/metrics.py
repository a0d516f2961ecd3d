"""Figures that evaluations report: retrieval recall."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(scores: Tensor, truths: list[list[int]] | list[int]) -> Tensor:
    """Rank of the best true column in each row of `scores` [R, C], 0 being first: [R] int64.

    truths[r]: the true column or columns of row r. A tie counts against the row, so that a model which scores
    everything alike recalls nothing. Raises ValueError for a row without a true column.
    """
    check_truths(truths)
    best = []
    for row, truth in zip(scores, truths, strict=True):
        score = row[torch.as_tensor(truth)].max()
        best.append(int((row >= score).sum()) - 1 if not score.isnan() else len(row))
    return torch.tensor(best)


def check_truths(truths: list[list[int]] | list[int]) -> None:
    """Raises ValueError for a query that nothing belongs to: it can be neither right nor wrong."""
    for row, truth in enumerate(truths):
        if not torch.as_tensor(truth).numel():
            raise ValueError(f"Nothing belongs to query {row} (a picture without texts, say): leave it out.")


def recall(
    scores: Tensor, truths: list[list[int]] | list[int], ks: tuple[int, ...] = (1, 5, 10)
) -> list[float]:
    """Recall@k in per cent for each k, of rows of `scores` [R, C] whose true columns are `truths`."""
    found = ranks(scores, truths)
    return [100.0 * (found < k).float().mean().item() for k in ks]


def retrieval_metrics(
    scores_i2t: Tensor, scores_t2i: Tensor, img2txt: list[list[int]], txt2img: list[int]
) -> dict[str, float]:
    """The official figures, in per cent: txt_r* (texts found by a picture) and img_r* (pictures found by a text).

    scores_i2t [I, T], scores_t2i [T, I]. A picture counts by the best ranked of its texts.
    """
    txt_r1, txt_r5, txt_r10 = recall(scores_i2t, img2txt)
    img_r1, img_r5, img_r10 = recall(scores_t2i, txt2img)
    txt_mean, img_mean = (txt_r1 + txt_r5 + txt_r10) / 3, (img_r1 + img_r5 + img_r10) / 3
    return {
        "txt_r1": txt_r1,
        "txt_r5": txt_r5,
        "txt_r10": txt_r10,
        "txt_r_mean": txt_mean,
        "img_r1": img_r1,
        "img_r5": img_r5,
        "img_r10": img_r10,
        "img_r_mean": img_mean,
        "r_mean": (txt_mean + img_mean) / 2,
    }
