"""The image encoder's forward pass in int8 and fp8, beside bf16."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases import Case, Contenders, built_late
from benchmarks.contenders import Models
from benchmarks.models.encoder import flops
from blipfast.models.blip import blip_feature_extractor
from blipfast.quantize import quantize


def cases(device: str) -> list[Case]:
    models = Models.for_gpu(device, 384)
    B, work = (128, flops(384)) if device == "cuda" else (2, 0)
    return [
        Case(
            "precision", f"ViT-B B{B} {models.side}px", models.dtype, partial(_make, models, B),
            B * work, 0, rank=0, items=B,
            remark="Ours is in bf16, whose ceiling it is; in int8 and fp8 are the products that `quantize` chooses.",
        )
    ]  # fmt: skip


def _make(models: Models, B: int) -> Contenders:
    image = models.pictures(B)

    def encoder(precision: str | None = None):
        model = models.ours(blip_feature_extractor)
        if precision:
            quantize(model, precision, models.device)
        return torch.no_grad()(partial(model.visual_encoder, image))

    names = {"ours": None, "int8": "int8", "fp8": "fp8"}
    return {name: built_late(partial(encoder, precision)) for name, precision in names.items()}
