"""Recall against a brute-force count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blipfast.metrics import ranks, recall, retrieval_metrics


def test_recall_equals_a_count_by_sorting():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 120, generator=generator)
    truths = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(40)]
    order = scores.argsort(1, descending=True)
    positions = [min(order[i].tolist().index(t) for t in truth) for i, truth in enumerate(truths)]
    assert ranks(scores, truths).tolist() == positions
    assert recall(scores, truths, (1, 5, 10)) == pytest.approx(
        [100 * sum(p < k for p in positions) / 40 for k in (1, 5, 10)]
    )


def test_a_picture_without_texts_is_named():
    with pytest.raises(ValueError, match="Nothing belongs to query 1"):
        recall(torch.zeros(3, 5), [[0], [], [2]])


def test_true_columns_may_be_a_tensor_or_an_array():
    scores, truths = torch.eye(4)[[0, 1, 3, 2]], [0, 1, 2, 3]
    expected = recall(scores, truths, (1, 2))
    assert (
        recall(scores, torch.tensor(truths), (1, 2)) == recall(scores, list(np.arange(4)), (1, 2)) == expected
    )


def test_ties_and_nan_count_against_the_model():
    assert ranks(torch.zeros(2, 5), [0, 4]).tolist() == [4, 4]
    assert recall(torch.full((2, 3), torch.nan), [0, 1], (1,)) == [0.0]


def test_official_names_in_per_cent():
    metrics = retrieval_metrics(torch.eye(3), torch.eye(3).roll(1, 0), [[0], [1], [2]], [0, 1, 2])
    assert metrics["txt_r1"] == 100.0 and metrics["img_r1"] == 0.0
    assert metrics["r_mean"] == (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2
