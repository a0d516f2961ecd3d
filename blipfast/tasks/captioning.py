"""Captions of a set of pictures, by all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from tqdm import tqdm

from blipfast.config import EvaluateConfig
from blipfast.models import gather
from blipfast.models.blip import BLIP_Decoder

from .sharing import collect


def captions_of(
    model: BLIP_Decoder, batches: Iterable[Tensor], share: Sequence[int], total: int, settings: EvaluateConfig
) -> list[str]:
    """A caption for each of `total` pictures; batches [B, 3, S, S] are those of this rank's `share`, in order."""
    stream = model.generate_stream(
        batches,
        num_beams=settings.num_beams,
        max_length=settings.max_length,
        min_length=settings.min_length,
        repetition_penalty=settings.repetition_penalty,
    )
    bar = tqdm(stream, "captioning", len(share), leave=False, disable=gather.rank() > 0 or None)
    return collect({i: texts[0] for i, texts in zip(share, bar, strict=True)}, total)
