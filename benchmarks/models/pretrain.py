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
REFERENCE_MEMORY = (
    110e9  # bytes that a GPU needs for the reference's step with 384 pairs, which itself takes 99 GB
)


def cases(device: str) -> list[Case]:
    models = Models.for_gpu(device, 224, torch.float32)
    both, ours = ("ours", "reference"), ("ours",)
    batches, flops = {2: both}, 0  # of each batch, whom to measure
    if device == "cuda":
        large = torch.cuda.get_device_properties(0).total_memory > REFERENCE_MEMORY
        batches, flops = {384 if large else 192: both, 768: ours, 128: both}, FLOPS
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
