"""Retrieval: ITM scores of many texts an image beside `reference.py`; and a test set as large as COCO's, in part."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases import Case, Contenders, built_late
from benchmarks.contenders import CAPTION, Models, padded
from benchmarks.targets import Target
from blipfast import reference
from blipfast.models.blip_itm import blip_itm
from blipfast.tasks.scoring import Collection

IMAGES, TEXTS, CANDIDATES = 5000, 25_010, 256  # COCO's test set, and how many candidates are reranked
TEXTS_AN_IMAGE = (IMAGES + TEXTS) * CANDIDATES // IMAGES  # reranked, if both directions want different pairs
REMARK = (
    "retrieval: a part of COCO's test evaluation ({images} of 5,000 images): encoding of images and texts, and the "
    "rerank of {texts:,} texts an image, which are k = 256 in both directions if none is wanted by both. The whole is "
    "this time x {parts:.1f}. Not in it: reading and resizing pictures, and the search for the candidates among 125 "
    "million cosines on the host."
)


def cases(device: str) -> list[Case]:
    models = Models.for_gpu(device, 384)
    images, texts, M, each = (64, TEXTS_AN_IMAGE, 4, 256) if device == "cuda" else (4, 12, 2, 8)
    parts = IMAGES / images
    return [
        Case(
            "rerank", f"M{M} {models.side}px {each} texts an image", models.dtype,
            partial(rerankers, models, M, each), 0, 0, rank=0, items=M * each,
            targets=(Target("speed", 8.0, ("reference",)),),
        ),
        Case(
            "retrieval", f"M{images} {models.side}px {texts} texts an image", models.dtype,
            partial(_retrieval, models, images, texts), 0, 0, rank=0, items=images * texts, parts=parts,
            targets=(Target("seconds", 120.0),),
            remark=REMARK.format(images=images, texts=texts, parts=parts),
        ),
    ]  # fmt: skip


def rerankers(models: Models, M: int, each: int) -> Contenders:
    """ITM logits of M images, whose states are there, each against its own texts."""
    states, texts = models.states(M), [CAPTION] * each
    image_of = [m for m in range(M) for _ in range(each)]

    def ours():
        model = models.ours(blip_itm)
        ids = model.encode_text(texts) * M
        return torch.no_grad()(lambda: model.match(model.image_states(states), ids, image_of))

    def official():
        model = models.reference(reference.BLIP_ITM)
        text = padded(texts, 35, models.device).starting(model.tokens.enc)

        @torch.no_grad()
        def match():
            with models.autocast():
                encoded = (model.text_encoder(text, s.expand(each, -1, -1))[:, 0] for s in states)
                return torch.cat([model.itm_head(first) for first in encoded])

        return match

    return {"ours": built_late(ours), "reference": built_late(official)}


def _retrieval(models: Models, images: int, texts: int) -> Contenders:
    """`Collection` as the evaluation uses it, every text being a candidate of every image."""
    pictures = models.pictures(images).cpu()

    def ours():
        model = models.ours(blip_itm)

        @torch.no_grad()
        def evaluate():
            load = lambda indices: pictures[indices]  # noqa: E731
            return Collection(model, load, images, [CAPTION] * texts, models.device).rerank(texts)

        return evaluate

    return {"ours": built_late(ours)}
