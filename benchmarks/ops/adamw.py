"""One optimizer step and the momentum encoders' average, beside torch's optimizers and apex's."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch

from benchmarks.cases import Case, modes, ours
from benchmarks.targets import Target
from blipfast.ops.adamw import AdamWEma

BYTES = 36  # an element: weight, two moments and average read and written, gradient read; all fp32
SETTINGS = {"lr": 1e-4, "weight_decay": 0.05}
MOMENTUM = 0.995
TARGETS = (Target("ceiling", 0.75), Target("speed", 1.5, ("eager", "compiled", "foreach", "apex")))


def vit(depth=12, D=768, N=197) -> list[tuple[int, ...]]:
    block = [(3 * D, D), (3 * D,), (D, D), (D,), (4 * D, D), (4 * D,), (D, 4 * D), *[(D,)] * 5]
    return [(D, 3, 16, 16), (D,), (1, 1, D), (1, N, D), (D,), (D,), *block * depth]


def med(layers=12, D=768, words=30524) -> list[tuple[int, ...]]:
    attention = [(D, D), (D,)] * 4 + [(D,)] * 2
    layer = [*attention * 2, (4 * D, D), (4 * D,), (D, 4 * D), *[(D,)] * 3]
    return [(words, D), (512, D), (D,), (D,), *layer * layers]


def cases(device: str) -> list[Case]:
    """compiled only with the image encoder: it compiles for minutes over all of a BLIP."""
    if device != "cuda":
        return _cases(device, "toy", vit(2, 64, 17), 0, compile_it=False)
    whole = _cases(device, "BLIP base", vit() + med(), 0, compile_it=False)
    return whole + _cases(device, "ViT-B", vit(), 0, compile_it=True)


def _cases(device, name, shapes, rank, compile_it) -> list[Case]:
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    name = f"{name} {len(shapes)} tensors {elements / 1e6:.4g}M"
    make = partial(_make, device, shapes, compile_it)
    return modes(
        "adamw", name, torch.float32, make, forward=(0, BYTES * elements), rank=rank, targets=TARGETS
    )


def _make(device, shapes, compile_it):
    params = [(0.02 * torch.randn(shape, device=device)).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    averages = [p.detach().clone() for p in params]
    fused = AdamWEma(params, zip(params, averages), **SETTINGS)
    contenders = ours("adamw", device, partial(fused.step, momentum=MOMENTUM))

    def beside(optimizer):
        @torch.no_grad()
        def step():
            optimizer.step()
            torch._foreach_lerp_(averages, params, 1 - MOMENTUM)

        return step

    adamw = partial(torch.optim.AdamW, params, **SETTINGS)
    one_by_one = adamw(foreach=False, fused=False)

    @torch.no_grad()
    def eager():
        one_by_one.step()
        for average, p in zip(averages, params):
            average.lerp_(p, 1 - MOMENTUM)

    contenders |= {
        "eager": eager,
        "foreach": beside(adamw(foreach=True)),
        "fused": beside(adamw(fused=True)),
    }
    if compile_it:
        contenders["compiled"] = torch.compile(beside(adamw(foreach=True, capturable=True)), dynamic=False)
    if device == "cuda" and importlib.util.find_spec("amp_C"):
        from apex.optimizers import FusedAdam

        contenders["apex"] = beside(FusedAdam(params, adam_w_mode=True, **SETTINGS))
    return contenders, ()
