"""AdamW, from three makers by config (torch, DeepSpeed, NVIDIA apex), and Muon with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..config import TrainConfig
from ..ops.adamw import AdamWEma
from .errors import TrainingError
from .muon import Muon, matrices

STATES = ("exp_avg", "exp_avg_sq")  # the two Adam moments, called so by all makers; Muon keeps the first only


def build_optimizer(
    train: TrainConfig, model: nn.Module, device: torch.device, offload: bool = False, whole: bool = True
):
    """The optimizer of the trained parameters of `model`, by `train.optimizer`.

    adamw      AdamW and the momentum encoders' average in one pass (AdamWEma). Where the optimizer does not get whole
               fp32 parameters (`whole=False`): torch.optim.AdamW(fused=True)
    deepspeed  FusedAdam on CUDA; DeepSpeedCPUAdam on CPU and with optimizer offload. Compiled at first use.
    apex       NVIDIA apex's FusedAdam, built from source with its CUDA extensions
    muon       Muon for the matrices of transformer layers, with `train.muon_lr`; the rest as adamw

    Raises ValueError for an unknown name, TrainingError saying what to install when a maker is absent.
    """
    groups = parameter_groups(model, train.weight_decay, train.decay_all)
    settings: dict[str, Any] = {"lr": train.lr, "betas": tuple(train.betas), "eps": train.eps}
    if train.optimizer == "adamw":
        if whole:
            return AdamWEma(groups, model.momentum_pairs(), **settings)
        return torch.optim.AdamW(groups, fused=True, **settings)
    if train.optimizer == "deepspeed":
        return _deepspeed_adam(device, offload)(groups, **settings)
    if train.optimizer == "apex":
        return _apex_adam(device)(groups, adam_w_mode=True, **settings)
    if train.optimizer == "muon":
        return _muon(train, model, groups, settings)
    raise ValueError(
        f"train.optimizer: {train.optimizer!r} is not known. Choose adamw, deepspeed, apex or muon"
    )


def parameter_groups(model: nn.Module, weight_decay: float, decay_all: bool) -> list[dict[str, Any]]:
    """One group with decay on everything (official), or two: biases, norms and scalars (ndim < 2) without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if decay_all:
        return [{"params": trained, "weight_decay": weight_decay}]
    decayed = [p for p in trained if p.ndim >= 2]
    others = [p for p in trained if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _muon(train: TrainConfig, model: nn.Module, groups: list[dict[str, Any]], settings: dict[str, Any]):
    chosen = list(matrices(model).values())
    if not chosen:
        raise TrainingError("train.optimizer=muon: this model has no transformer layers. Use adamw")
    ids = {id(p) for p in chosen}
    for group in groups:
        group |= {"params": [p for p in group["params"] if id(p) not in ids], "muon": False}
    ratio = train.muon_lr / train.lr
    hidden = {"params": chosen, "weight_decay": train.weight_decay, "muon": True, "lr_ratio": ratio}
    return Muon([hidden, *groups], **settings)


def state_names(train: TrainConfig, model: nn.Module) -> dict[str, set[str]]:
    """For each of STATES, the names of the parameters for which the optimizer keeps it."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    first_only = set(matrices(model)) if train.optimizer == "muon" else set()
    return {"exp_avg": trained, "exp_avg_sq": trained - first_only}


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
    hidden = {id(p) for group in optimizer.param_groups if group.get("muon") for p in group["params"]}
    for p in parameters:
        state = optimizer.state[p]
        if id(p) not in hidden:
            state["step"] = torch.zeros((), device=p.device) if _is_torchs(optimizer) else 0
        for key in STATES[:1] if id(p) in hidden else STATES:
            state[key] = torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
    set_step(optimizer, 0)


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the counter of bias correction, which makers keep in the state, in the group, or in both."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].fill_(step)
        elif "step" in state:
            state["step"] = step
    if not _is_torchs(optimizer):
        for group in optimizer.param_groups:
            group["step"] = step


def _is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch's AdamW does the bias correction, which counts in fp32 tensors."""
    return isinstance(optimizer, torch.optim.AdamW | Muon)
