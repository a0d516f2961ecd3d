"""Muon for the matrices of transformer layers, AdamW for everything else (`train.optimizer: muon`).

Muon replaces the momentum of a matrix by the nearest matrix whose singular values are all about 1: every direction
learns equally fast. Small models trained from random weights need several times fewer epochs than with AdamW.
Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. torch.optim.Muon gives the
same updates, one matrix at a time and always in bf16, which processors without bf16 units only emulate; here matrices
of one shape are one batched product, in bf16 only where that is fast.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from ..precision import fast_bf16

LAYER = re.compile(r"(^|\.)(blocks|layer)\.\d+\.")  # of ViT, of BERT: not embeddings, projections and heads
MOMENTUM, EPS = 0.95, 1e-7
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial, iterated, that moves singular values to about 1
ITERATIONS = 5


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that Muon updates, by name: trained matrices inside transformer layers."""
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim == 2 and LAYER.search(name)
    }


class Muon(torch.optim.Optimizer):
    """Muon on the groups marked `muon=True` (2-D parameters only), fused AdamW on the others.

    groups: parameter groups, each with "params", "weight_decay" and "muon". adam: settings of torch.optim.AdamW.
    State of a matrix: `exp_avg`, the momentum, and nothing else.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, **adam: Any):
        super().__init__(groups, {"lr": lr})
        others = [group for group in self.param_groups if not group["muon"]]
        self.adamw = torch.optim.AdamW(others, lr=lr, fused=True, **adam)
        self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        self.adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                self._step(group)

    def _step(self, group: dict[str, Any]) -> None:
        same_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                same_shape[tuple(p.shape)].append(p)
        for (rows, columns), params in same_shape.items():
            gradients, momenta = [p.grad for p in params], [self.state[p]["exp_avg"] for p in params]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            updates = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's look ahead
            scale = max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            orthogonal = orthogonalize(torch.stack(updates)).to(params[0].dtype)
            torch._foreach_add_(params, list(orthogonal), alpha=-group["lr"] * scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Move all singular values of each matrix of a batch to about 1 (0.7 to 1.2), by a Newton-Schulz iteration.

    [N, rows, columns] -> the same, in bf16 where the device is fast at it, else fp32.
    """
    x = matrices.to(torch.bfloat16 if fast_bf16(matrices.device) else torch.float32)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(EPS)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
