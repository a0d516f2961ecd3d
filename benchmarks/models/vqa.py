"""VQA by ranking of 128 candidate answers, beside `reference.py`."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases import Case, Contenders, built_late
from benchmarks.contenders import ANSWERS, QUESTION, Models, padded
from benchmarks.targets import Target
from blipfast import reference
from blipfast.models.blip_vqa import blip_vqa


def cases(device: str) -> list[Case]:
    models = Models.for_gpu(device, 480)
    B = 16 if device == "cuda" else 1
    return [
        Case(
            "vqa", f"B{B} {models.side}px 128 candidates", models.dtype, partial(rankers, models, B),
            0, 0, rank=0, items=B, targets=(Target("speed", 1.8, ("reference",)),),
        )
    ]  # fmt: skip


def rankers(models: Models, B: int) -> Contenders:
    """The likeliest answer to each of B questions, every one about its own picture."""
    image, questions = models.pictures(B), [QUESTION] * B
    options = {"train": False, "inference": "rank", "k_test": 128}

    def ours():
        model = models.ours(blip_vqa)
        return torch.no_grad()(lambda: model(image, questions, ANSWERS, **options))

    def official():
        model = models.reference(reference.BLIP_VQA)
        text = padded(questions, "longest", models.device)
        answers = padded(ANSWERS, "longest", models.device).starting(model.tokens.dec)

        def rank():
            with models.autocast():
                return model.rank(image, text, answers, 128)

        return rank

    return {"ours": built_late(ours), "reference": built_late(official)}
