"""AdamW, from three makers by config: torch (fused), DeepSpeed, NVIDIA apex."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..config import TrainConfig
from .errors import TrainingError

STATES = ("exp_avg", "exp_avg_sq")  # the two Adam moments, called so by all three makers


def build_optimizer(train: TrainConfig, model: nn.Module, device: torch.device, offload: bool = False):
    """AdamW over the trained parameters of `model`, by `train.optimizer`.

    adamw      torch.optim.AdamW(fused=True)
    deepspeed  FusedAdam on CUDA; DeepSpeedCPUAdam on CPU and with optimizer offload. Compiled at first use.
    apex       NVIDIA apex's FusedAdam, built from source with its CUDA extensions

    Raises ValueError for an unknown name, TrainingError saying what to install when a maker is absent.
    """
    groups = parameter_groups(model, train.weight_decay, train.decay_all)
    settings: dict[str, Any] = {"lr": train.lr, "betas": tuple(train.betas), "eps": train.eps}
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    if train.optimizer == "deepspeed":
        return _deepspeed_adam(device, offload)(groups, **settings)
    if train.optimizer == "apex":
        return _apex_adam(device)(groups, adam_w_mode=True, **settings)
    raise ValueError(f"train.optimizer: {train.optimizer!r} is not known. Choose adamw, deepspeed or apex")


def parameter_groups(model: nn.Module, weight_decay: float, decay_all: bool) -> list[dict[str, Any]]:
    """One group with decay on everything (official), or two: biases, norms and scalars (ndim < 2) without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if decay_all:
        return [{"params": trained, "weight_decay": weight_decay}]
    decayed = [p for p in trained if p.ndim >= 2]
    others = [p for p in trained if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _deepspeed_adam(device: torch.device, offload: bool):
    name = "FusedAdam" if device.type == "cuda" and not offload else "DeepSpeedCPUAdam"
    try:
        from deepspeed.ops import adam
    except ImportError as error:
        raise TrainingError(
            "train.optimizer=deepspeed needs DeepSpeed: pip install deepspeed, or train.optimizer=adamw"
        ) from error

    def make(groups: list[dict[str, Any]], **settings: Any):
        try:
            return getattr(adam, name)(groups, **settings)
        except Exception as error:  # a compiler's complaint arrives as many types
            raise TrainingError(
                f"DeepSpeed could not build {name} (it compiles it at first use: a C++ compiler, ninja and, on a GPU, "
                f"nvcc are needed). Use train.optimizer=adamw instead. The reason given: {error}"
            ) from error

    return make


def _apex_adam(device: torch.device):
    """apex.optimizers.FusedAdam; the package called `apex` on PyPI is an unrelated one and is told apart."""
    hint = "Build NVIDIA's from https://github.com/NVIDIA/apex with --cpp_ext --cuda_ext, or set train.optimizer=adamw"
    try:
        import apex
    except ImportError as error:
        raise TrainingError(f"train.optimizer=apex: apex is not installed. {hint}") from error
    try:
        import amp_C  # noqa: F401  (the CUDA extension that FusedAdam launches)
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise TrainingError(
            f"train.optimizer=apex: the apex at {getattr(apex, '__path__', ['?'])[0]} is not NVIDIA's, or was built "
            f"without its CUDA extensions ({error}). {hint}"
        ) from error
    if device.type != "cuda":
        raise TrainingError("train.optimizer=apex needs a CUDA device; set train.optimizer=adamw")
    return FusedAdam


def init_state(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> None:
    """Create zero moments now rather than in the first step, so that saving and loading need no special case.

    `parameters` are the tensors that the optimizer updates (DeepSpeed's flat fp32 ones under ZeRO).
    """
    fused_torch = isinstance(optimizer, torch.optim.AdamW)
    for p in parameters:
        state = optimizer.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device) if fused_torch else 0
        for key in STATES:
            state[key] = torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
    set_step(optimizer, 0)


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the counter of bias correction, which makers keep in the state, in the group, or in both."""
    for state in optimizer.state.values():
        if isinstance(state["step"], torch.Tensor):
            state["step"].fill_(step)
        else:
            state["step"] = step
    if not isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:
            group["step"] = step
