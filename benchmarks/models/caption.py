"""Captions of many pictures by beam search, all of 20 tokens with the prompt, beside transformers' BLIP in each setting
that it has. Pictures come in batches; on a GPU ours decodes those of several at a time by itself, and transformers is
also given all at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, Contenders, built_late
from benchmarks.contenders import Models
from benchmarks.targets import Target
from blipfast.models.blip import blip_decoder

BEAMS = {"num_beams": 3, "max_length": 20, "min_length": 20}
SEP = 102
BATCHES = 4


def cases(device: str) -> list[Case]:
    models = Models.for_gpu(device, 384)
    B = 32 if device == "cuda" else 1
    return [
        Case(
            "caption", f"{BATCHES} x B{B} {models.side}px 3 beams 20 tokens", models.dtype, partial(_make, models, B),
            0, 0, rank=0, items=BATCHES * B, targets=(Target("speed", 8.0, ("transformers",)),),
            remark="Settings that transformers' BLIP refuses are listed under 'Without a figure'.",
        )
    ]  # fmt: skip


def _make(models: Models, B: int) -> Contenders:
    images = models.pictures(BATCHES * B).split(B)

    def ours():
        model = models.ours(blip_decoder)
        return lambda: list(model.generate_stream(images, **BEAMS))

    def theirs(attention="eager", change=lambda model: model, images=images, **settings):
        def build():
            if settings:  # what a CPU refuses with an error would cost a GPU its CUDA context
                small = Models.for_gpu("cpu", 64)
                by_transformers(small.transformers(attention), [small.pictures(1)], **settings)()
            return by_transformers(change(models.transformers(attention)), images, **settings)

        return built_late(build)

    found = {
        "ours": built_late(ours),
        "transformers": theirs(),
        "transformers sdpa": theirs("sdpa"),
        "transformers static cache": theirs(cache_implementation="static"),
    }
    if models.device == "cuda":
        whole = [torch.cat(images)]
        found |= {
            "transformers at once": theirs(images=whole),
            "transformers compiled, at once": theirs(change=compiled, images=whole),
        }
    return found


def by_transformers(model: nn.Module, images: Sequence[Tensor], **settings):
    """Captions of batches of pictures by transformers' `generate`: a function that gives token ids [B, 20] of each."""
    prompt = torch.tensor([30522, 1037, 3861, 1997, SEP], device=images[0].device)  # [DEC] a picture of [SEP]

    def caption(image: Tensor) -> Tensor:
        ids = prompt.repeat(len(image), 1)  # it drops the last, and writes in it
        return model.generate(pixel_values=image, input_ids=ids, **BEAMS, **settings)

    return lambda: [caption(image) for image in images]


def compiled(model: nn.Module) -> nn.Module:
    """Both parts under torch.compile; a cache that grows makes it compile the decoder for any length."""
    model.vision_model.forward = torch.compile(model.vision_model.forward)
    model.text_decoder.forward = torch.compile(model.text_decoder.forward)
    return model
