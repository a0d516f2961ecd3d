"""Searches whose steps are recorded, kept for the next call that is alike: recording takes longer than replaying.

One for each decoder, until a call that is not alike, `forget`, or the decoder's end: meanwhile its caches stay on the
GPU (for BLIP base at 384 pixels 21 MB an image in half precision).
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from blipfast import backends
from blipfast.ops.launch import input_precision

from . import token_search
from .token_search import Search

_idle: WeakKeyDictionary[nn.Module, tuple[dict[str, Any], Search]] = WeakKeyDictionary()


def likeness(
    kind: type[Search], rules: object, prompt: Tensor, decoder: nn.Module, embeds: Tensor, mask: Tensor | None
) -> dict[str, Any] | None:
    """All that a record depends on but for the numbers in the tensors that it reads; None where none is made.

    embeds, mask: of the first images.
    """
    if not token_search.replays(prompt.device):
        return None
    weights = [*decoder.parameters(), *decoder.buffers()]
    return {
        "kind": kind,
        "rules": rules,
        "prompt": len(prompt),
        "images": (embeds.shape, embeds.dtype, embeds.device, mask is not None),
        "weights": [(x.data_ptr(), x.dtype) for x in weights],
        "training": [module.training for module in decoder.modules()],
        "served": backends.asked(),
        "fp32": input_precision(),
        "autocast": torch.is_autocast_enabled(prompt.device.type),
        "inference": torch.is_inference_mode_enabled(),
    }


def take(decoder: nn.Module, like: dict[str, Any] | None, prompt: Tensor) -> Search | None:
    """The search that the last call left, if it was alike; else its memory is free. The caller's until `leave`."""
    left, found = _idle.pop(decoder, (None, None))
    if found is None or left != like:
        return None
    found.decoding.decoder = decoder
    found.decoding.renew()
    found.prompt.copy_(prompt)
    return found


def leave(decoder: nn.Module, like: dict[str, Any] | None, done: Search) -> None:
    """Keep a search that has come to its end, if its steps are recorded."""
    if like is not None:
        done.decoding.decoder = None  # which is alive only as long as others hold it
        _idle[decoder] = like, done


def forget(decoder: nn.Module) -> None:
    """Give the memory back."""
    _idle.pop(decoder, None)
