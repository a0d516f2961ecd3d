"""Contrastive keys and hard negatives of all ranks: two ranks compute what one with both their batches does."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from blipfast.models import momentum
from blipfast.models.blip_pretrain import blip_pretrain
from blipfast.text import train_tokenizer

from .conftest import BERT, VIT
from .ranks import on_ranks

CAPTIONS = ["a cat", "a dog", "a bug", "a bee", "a fox", "a hen"]  # equally many tokens on both ranks


def losses_and_gradients(images, captions) -> tuple[list[float], dict[str, torch.Tensor]]:
    momentum.sample_negatives = lambda weights: weights.argmax(
        1
    )  # the hardest, so that nothing is left to chance
    torch.manual_seed(0)
    model = blip_pretrain(
        med_config=dict(BERT),
        vit=dict(VIT),
        image_size=32,
        embed_dim=8,
        queue_size=10,
        tokenizer=train_tokenizer(CAPTIONS, vocab_size=270),
        negative_all_rank=True,
    )
    losses = model(images, captions, 0.4)
    sum(losses).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [loss.item() for loss in losses], gradients


def one_rank():
    rank, world = dist.get_rank(), dist.get_world_size()
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    part = slice(3 * rank, 3 * rank + 3)
    losses, gradients = losses_and_gradients(images[part], CAPTIONS[part])
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= world
    total = torch.tensor(losses)
    dist.all_reduce(total)
    return (total / world).tolist(), gradients


def test_two_ranks_share_their_negatives(monkeypatch):
    monkeypatch.setattr(momentum, "sample_negatives", momentum.sample_negatives)  # put back afterwards
    found = on_ranks(2, one_rank)
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    losses, gradients = losses_and_gradients(images, CAPTIONS)
    for theirs, their_gradients in found:
        assert theirs == pytest.approx(losses, rel=1e-5)
        for name, gradient in gradients.items():
            assert (their_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, name
