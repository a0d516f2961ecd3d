"""Small models and pictures that the tests share."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)

BERT = dict(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
VIT = dict(width=32, depth=2, heads=4, patch_size=8)


@pytest.fixture
def small() -> dict:
    """Constructor arguments of a model that runs in milliseconds."""
    return dict(med_config=dict(BERT), vit=dict(VIT), image_size=32)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
