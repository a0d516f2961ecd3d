"""What the loop needs of an engine, and the plain one: torch alone, one process, whole parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..config import Config
from ..ops.adamw import AdamWEma
from ..precision import fast_bf16
from .distributed import World
from .optimizer import build_optimizer, init_state, set_step, state_names

WEIGHT = "weight"  # beside optimizer.STATES: which tensor of a parameter `read` and `write` mean


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether `train.precision` means autocast to bf16 here; "auto": where the hardware multiplies bf16 faster."""
    return fast_bf16(device) if precision == "auto" else precision == "bf16"


class AutocastModule(nn.Module):
    """`model(batch, alpha=...)` under autocast to bf16 when asked: inputs and fp32 buffers may then meet bf16 weights.

    Autocast lies inside the module because DeepSpeed's engine switches off one that it finds around itself.
    """

    def __init__(self, model: nn.Module, bf16: bool, device: torch.device):
        super().__init__()
        self.model = model
        self.bf16 = bf16
        self.device_type = device.type

    def forward(self, batch: dict[str, Any], alpha: float) -> dict[str, torch.Tensor]:
        with self.autocast():
            return self.model(batch, alpha=alpha)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.bf16)


class Engine:
    """One model and its optimizer. A step is `accumulation` calls of `forward_backward`, then `step`.

    Here: parameters whole and in fp32 on this one process. `DeepSpeedEngine` overrides what sharding changes.
    """

    name = "plain torch"

    def __init__(self, config: Config, model: nn.Module, world: World):
        self.accumulation = config.train.accumulation
        self.clip = config.train.grad_clip
        self.model = model.to(world.device)
        self.device = world.device
        self.module = AutocastModule(self.model, use_bf16(config.train.precision, world.device), world.device)
        self.states = state_names(config.train, model)
        self.optimizer = build_optimizer(config.train, self.model, world.device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        init_state(self.optimizer, self.trained)

    # ---- training

    def forward_backward(self, batch: dict[str, Any], alpha: float) -> dict[str, torch.Tensor]:
        """Add the gradients of one micro-batch's loss / accumulation; returns the model's outputs, detached."""
        outputs = self.module(batch, alpha=alpha)
        (outputs["loss"] / self.accumulation).backward()
        return {name: value.detach() for name, value in outputs.items()}

    @property
    def averages(self) -> bool:
        """Whether `step` moves the momentum encoders too, in the same pass."""
        return isinstance(self.optimizer, AdamWEma)

    def step(self, learning_rate: float, momentum: float) -> torch.Tensor:
        """Update the weights from the accumulated gradients and, if `averages`, the momentum encoders.

        Returns the norm of the gradients before they are clipped to `train.grad_clip`, fp32, on the device. Weights are
        left alone when it is not finite; an optimizer other than AdamWEma has the host wait to know. A parameter that
        the loss did not reach gets a zero gradient, as under DeepSpeed.
        """
        for p in self.trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        norm = nn.utils.get_total_norm([p.grad for p in self.trained])
        self.set_learning_rate(learning_rate)
        if self.averages:
            scale = (self.clip / (norm + 1e-6)).clamp(max=1.0) if self.clip > 0 else torch.ones_like(norm)
            self.optimizer.grad_scale = torch.where(norm.isfinite(), scale, torch.nan)
            self.optimizer.momentum = momentum
            self.apply()
        elif norm.isfinite():
            if self.clip > 0:
                nn.utils.clip_grads_with_norm_(self.trained, self.clip, norm)
            self.apply()
        return norm

    def apply(self) -> None:
        """Let the optimizer take its step, and drop the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)

    @torch.no_grad()
    def clamp(self, parameter: nn.Parameter, low: float, high: float) -> None:
        """Keep a trained parameter, and its master if it has one, within [low, high]. After `step`'s averages."""
        parameter.clamp_(low, high)

    # ---- what this rank holds of a parameter (everything, here)

    def local(self, parameter: nn.Parameter) -> torch.Tensor:
        """The part of a parameter that this rank updates: all of it, or a flat shard."""
        return parameter.data

    def shard(self, parameter: nn.Parameter, full: torch.Tensor) -> torch.Tensor:
        """The part of `full` that corresponds to `local(parameter)`."""
        return full

    def gather(self, parameter: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
        """The whole tensor from every rank's part. Collective."""
        return local

    def refresh(self, parameters: list[nn.Parameter]) -> None:
        """Renew whole copies after `local` parts were written. Collective."""

    # ---- full fp32 state of a parameter, for checkpoints and evaluation

    def read(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        """The whole fp32 master weight, `exp_avg` or `exp_avg_sq` of a parameter, on every rank. Collective.

        `self.states` names the parameters for which the optimizer keeps each of the latter two.
        """
        return parameter.data.float() if key == WEIGHT else self.optimizer.state[parameter][key]

    def write(self, parameter: nn.Parameter, key: str, full: torch.Tensor) -> None:
        """Set what `read` reads. After the last `write`, call `refresh` with the parameters written."""
        (parameter.data if key == WEIGHT else self.optimizer.state[parameter][key]).copy_(full)

    def set_step(self, step: int) -> None:
        """Set the number of updates done, for Adam's bias correction."""
        set_step(self.optimizer, step)

    @contextlib.contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        """The model in evaluation mode with whole fp32 weights, under the run's autocast; hooks of engines are away."""
        self.model.eval()
        try:
            with torch.no_grad(), self.module.autocast():
                yield self.model
        finally:
            self.model.train()
