"""The image encoder's forward pass, beside transformers' and the plain one of `reference.py`."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases import Case, Contenders, built_late
from benchmarks.contenders import Models
from benchmarks.targets import Target
from blipfast import reference
from blipfast.models.blip import blip_feature_extractor


def flops(side: int, width: int = 768, depth: int = 12, patch: int = 16) -> int:
    """Of one picture: the patches' projection; in a block 4 + 8 products by a [D, D] matrix, and two of attention."""
    N = (side // patch) ** 2 + 1
    blocks = depth * (24 * N * width**2 + 4 * N**2 * width)
    return blocks + 2 * (N - 1) * 3 * patch**2 * width


def cases(device: str) -> list[Case]:
    models = Models.for_gpu(device, 384)
    B, work = (128, flops(384)) if device == "cuda" else (2, 0)
    return [
        Case(
            "encoder", f"ViT-B B{B} {models.side}px", models.dtype, partial(_make, models, B),
            B * work, 0, rank=0, items=B, targets=(Target("ceiling", 0.55),),
        )
    ]  # fmt: skip


def _make(models: Models, B: int) -> Contenders:
    image = models.pictures(B)

    def with_encoder(model):
        return torch.no_grad()(partial(model, image))

    found = {
        "ours": built_late(lambda: with_encoder(models.ours(blip_feature_extractor).visual_encoder)),
        "reference": built_late(lambda: with_encoder(models.reference(reference.BLIP_Base).visual_encoder)),
        "transformers": built_late(lambda: with_encoder(models.transformers().vision_model)),
    }
    if models.device == "cuda":
        theirs = lambda: torch.compile(models.transformers().vision_model)  # noqa: E731
        found["transformers compiled"] = built_late(lambda: with_encoder(theirs()))
    return found
