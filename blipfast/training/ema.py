"""Momentum encoders: an exponential moving average of the trained weights, once per optimizer step.

    momentum <- m * momentum + (1 - m) * trained

On the tensors that this rank holds: whole parameters, or its shards under ZeRO-3 (both sides are cut alike, so no
communication is needed). With parameters in bf16 the average is kept in an fp32 master, because a step of
(1 - 0.995) * difference is below the resolution of bf16 and the average would never move. AdamW on whole fp32
parameters takes this step itself (`Engine.averages`).
"""

from __future__ import annotations

import torch
from torch import nn

from .engine import Engine


class MomentumEncoders:
    """The pairs of `model.momentum_pairs()` and, where parameters are bf16, the fp32 masters of the averages."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = list(engine.model.momentum_pairs())
        self.masters = {
            id(average): engine.local(average).float()
            for _, average in self.pairs
            if average.dtype != torch.float32
        }

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """One step of the average. Call it after every step of an engine that does not average itself."""
        if not self.pairs:
            return
        averages = [self._fp32(average) for _, average in self.pairs]
        trained = [self.engine.local(parameter).to(torch.float32) for parameter, _ in self.pairs]
        torch._foreach_lerp_(averages, trained, 1 - momentum)
        self.publish()

    def master(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """This rank's fp32 master of an average; None where the parameter itself is fp32 or no average."""
        return self.masters.get(id(parameter))

    @torch.no_grad()
    def load(self, parameter: nn.Parameter, full: torch.Tensor) -> None:
        """Set an average, master and parameter, from its full fp32 value. `publish` afterwards."""
        self._fp32(parameter).copy_(self.engine.shard(parameter, full))

    def _fp32(self, average: nn.Parameter) -> torch.Tensor:
        return self.masters.get(id(average), self.engine.local(average))

    @torch.no_grad()
    def publish(self) -> None:
        """Bring what the model reads up to date with the masters. Collective under ZeRO-3."""
        averages = [average for _, average in self.pairs]
        for average in averages:
            if id(average) in self.masters:
                self.engine.local(average).copy_(self.masters[id(average)])
        self.engine.refresh(averages)
