"""A pre-training step, forward and backward under autocast as in training, beside `reference.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.cases import Case, Contenders, built_late
from benchmarks.contenders import CAPTION, Models, padded
from benchmarks.targets import Target
from blipfast import reference
from blipfast.models.blip_pretrain import blip_pretrain

# Of one pair with a caption of 14 tokens, at 224: counted by FlopCounterMode over our step, as in tests/test_flops.py.
# What official BLIP computes beyond it, 306.6 in all, is of no use.
FLOPS = 198.2e9


def cases(device: str) -> list[Case]:
    models = Models.for_gpu(device, 224, torch.float32)
    # of each batch, whom to measure: the reference takes 99 GB for 384 pairs, and would take twice that for 768
    both, ours = ("ours", "reference"), ("ours",)
    batches, flops = ({384: both, 768: ours, 128: both}, FLOPS) if device == "cuda" else ({2: both}, 0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shared = (
        Target("ceiling", 0.40),
        Target("speed", 4.0, ("reference",)),
        Target("memory", 0.65, ("reference",)),
    )
    return [
        Case(
            "pretrain", f"B{B} {models.side}px", dtype, partial(_make, models, B, device == "cuda", who),
            B * flops, 0, "full", 0, B, targets=shared if who is both else shared[:1],
            remark="fp32 weights under autocast to bf16, captions of 14 tokens, a queue of 57,600; without optimizer.",
        )
        for B, who in batches.items()
    ]  # fmt: skip


def _make(models: Models, B: int, bf16: bool, who: tuple[str, ...]) -> Contenders:
    return {which: built_late(partial(step_of, which, models, B, bf16)) for which in who}


def step_of(which: str, models: Models, B: int, bf16: bool = False) -> Callable[[], None]:
    """A function that does one step, forward and backward, of "ours" or the "reference"; bf16: under autocast."""
    torch.manual_seed(0)
    image, captions = models.pictures(B), [CAPTION] * (B - 1) + ["a cat"]
    if which == "ours":
        model = models.ours(blip_pretrain).train()
        forward = lambda: sum(model(image, captions, 0.4))  # noqa: E731
    else:
        model = models.reference(reference.BLIP_Pretrain).train()
        text = padded(captions, 30, models.device)
        forward = lambda: sum(model(image, text, 0.4).values())  # noqa: E731

    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        with torch.autocast(models.device, torch.bfloat16, enabled=bf16):
            loss = forward()
        loss.backward()
        for p in trained:
            p.grad = None

    return step
