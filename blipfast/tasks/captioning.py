"""Captions of a set of pictures, by all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from tqdm import tqdm

from blipfast.config import EvaluateConfig
from blipfast.models import gather
from blipfast.models.blip import BLIP_Decoder
from blipfast.models.generation import Rules

from .sharing import collect


def search(settings: EvaluateConfig) -> dict[str, float]:
    """What `generate_stream` is told of the settings."""
    names = ("num_beams", "max_length", "min_length", "repetition_penalty")
    return {name: getattr(settings, name) for name in names}


def check_search(model: BLIP_Decoder, settings: EvaluateConfig) -> None:
    """Raises ValueError for settings that the model cannot meet."""
    given, prompt = search(settings), len(model.prompt_ids("cpu"))
    given |= model.rules(False, given.pop("num_beams"), given.pop("repetition_penalty"))
    Rules.of(prompt, **given).check(prompt, model.text_decoder.config)


def captions_of(
    model: BLIP_Decoder, batches: Iterable[Tensor], share: Sequence[int], total: int, settings: EvaluateConfig
) -> list[str]:
    """A caption for each of `total` pictures; batches [B, 3, S, S] are those of this rank's `share`, in order."""
    stream = model.generate_stream(batches, **search(settings))
    bar = tqdm(stream, "captioning", len(share), leave=False, disable=gather.rank() > 0 or None)
    return collect({i: texts[0] for i, texts in zip(share, bar, strict=True)}, total)
