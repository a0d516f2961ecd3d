"""DeepSpeed as the engine: ZeRO 0 to 3, fp32 or bf16, and where it keeps each parameter's state.

    stage 0     parameters and moments whole on every rank; fp32 only (with bf16 we run stage 1: same numbers)
    stage 1, 2  the optimizer steps on one flat fp32 tensor a group, cut over ranks; `p._hp_mapping` finds p in it
    stage 3     `p.ds_tensor` is this rank's 1/N of p, flat and padded; small ones are also whole in `p.data`;
                the fp32 masters are cut in the same way

On a machine without a GPU DeepSpeed compiles a shared-memory collective (about a minute, a C++ compiler needed) that
only its inference uses; `quiet_deepspeed` tells it not to, so no compiler is needed. `deepspeed blipfast/train.py`
starts one rank a GPU, or on CPU one a NUMA node (one on a laptop); `deepspeed --num_gpus 2` starts two, also on CPU.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..config import Config
from . import distributed
from .distributed import World
from .engine import WEIGHT, AutocastModule, Engine, use_bf16
from .optimizer import build_optimizer, init_state, set_step, state_names

REFUSED = {  # settings of DeepSpeed that change what this engine relies on, and what to do instead
    "optimizer": "use train.optimizer, train.lr, train.betas, train.weight_decay",
    "scheduler": "use train.schedule",
    "fp16.enabled": "use bf16: {enabled: true} or train.precision=bf16",
    "torch_autocast.enabled": "use train.precision=bf16",
    "zero_optimization.zenflow": "leave it out",
    "zero_optimization.offload_optimizer.ratio": "leave it out: all of the optimizer is offloaded",
    "zero_optimization.zero_hpz_partition_size": "leave it out: momentum encoders are cut over all ranks",
    "zero_optimization.zero_quantized_weights": "leave it out",
    "zero_optimization.zero_quantized_nontrainable_weights": "leave it out: momentum encoders need their precision",
}


def available() -> bool:
    """Whether DeepSpeed is installed (not imported: that takes seconds)."""
    import importlib.util

    return importlib.util.find_spec("deepspeed") is not None


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The `deepspeed:` section completed with what the `train:` section says.

    Raises ValueError naming both keys where the two disagree, and for the settings in REFUSED.
    """
    ds, train = copy.deepcopy(config.deepspeed), config.train
    _refuse(ds)
    same = {
        "train_micro_batch_size_per_gpu": ("train.batch_size", train.batch_size),
        "gradient_accumulation_steps": ("train.accumulation", train.accumulation),
        "gradient_clipping": ("train.grad_clip", train.grad_clip),
        "train_batch_size": (
            "train.batch_size * train.accumulation * ranks",
            train.batch_size * train.accumulation * world_size,
        ),
    }
    for key, (name, value) in same.items():
        if ds.get(key, "auto") not in ("auto", value):
            raise ValueError(f"deepspeed.{key} is {ds[key]} but {name} is {value}. Leave deepspeed.{key} out")
        ds[key] = value
    if train.optimizer != "deepspeed":
        ds.setdefault("zero_force_ds_cpu_optimizer", False)  # offload works with torch's AdamW too
    # its timer of samples a second, which our log has too, stops the GPU twice a micro-batch
    ds.setdefault("timers", {"throughput": {"enabled": False}})
    zero = ds.setdefault("zero_optimization", {})
    if ds.get("bf16", {}).get("enabled") and not zero.get("stage"):
        zero["stage"] = 1
    if train.optimizer == "muon" and zero.get("stage"):
        raise ValueError(
            f"train.optimizer=muon needs whole matrices, which ZeRO-{zero['stage']} cuts (bf16 weights imply stage 1). "
            "Set deepspeed.zero_optimization.stage=0 with train.precision=bf16, or train.optimizer=adamw"
        )
    if not zero.get("stage"):
        ds["gradient_clipping"] = 0.0  # DeepSpeed's own clipping fails on scalars there: the engine does it
    return ds


def _refuse(ds: dict[str, Any]) -> None:
    for path, instead in REFUSED.items():
        value: Any = ds
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is True or value not in (None, False, 1):
            raise ValueError(f"deepspeed.{path}={value!r} does not work here: {instead}")
    for part in ("offload_optimizer", "offload_param"):
        if (ds.get("zero_optimization", {}).get(part) or {}).get("device") == "nvme":
            raise ValueError(f"deepspeed.zero_optimization.{part}.device=nvme does not work here: use cpu")


def quiet_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, without its probing of accelerators and its build of an operator that training never calls."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # it calls functions of torch by names that will go
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # read in one place: whether to compile the shared-memory collective
    return deepspeed


@contextlib.contextmanager
def _scalars_viewable() -> Iterator[None]:
    """Let DeepSpeed broadcast scalar parameters such as the temperature.

    DeepSpeed 0.19.8 views each parameter as bytes for that, which torch refuses for 0 dimensions.
    """
    view = torch.Tensor.view

    def view_scalar_too(tensor: torch.Tensor, *shape: Any) -> torch.Tensor:
        return view(tensor.reshape(1) if tensor.ndim == 0 and shape == (torch.uint8,) else tensor, *shape)

    torch.Tensor.view = view_scalar_too
    try:
        yield
    finally:
        del torch.Tensor.view  # the inherited method is seen again


class DeepSpeedEngine(Engine):
    """A model in DeepSpeed's hands. See `Engine` for the interface, the module's docstring for the layouts."""

    def __init__(self, config: Config, model: nn.Module, world: World):
        ds = deepspeed_config(config, world.size)
        deepspeed = quiet_deepspeed(world.device)
        zero = ds["zero_optimization"]
        self.stage: int = zero.get("stage", 0)
        self.bf16: bool = bool(ds.get("bf16", {}).get("enabled"))
        weights = ", bf16 weights" if self.bf16 else ""
        self.name = f"DeepSpeed {deepspeed.__version__} ZeRO-{self.stage}{weights}"
        self.accumulation, self.clip = config.train.accumulation, config.train.grad_clip
        self.device = world.device
        self.model = model
        self.module = AutocastModule(
            model, self.bf16 or use_bf16(config.train.precision, world.device), world.device
        )
        offload = (zero.get("offload_optimizer") or {}).get("device") == "cpu"
        self.states = state_names(config.train, model)
        optimizer = build_optimizer(
            config.train, model.to(world.device), world.device, offload, whole=self.stage == 0
        )
        with _scalars_viewable():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=self.module, optimizer=optimizer, config=ds
            )
        self.base_optimizer = optimizer
        self.trained = [p for p in model.parameters() if p.requires_grad]
        init_state(optimizer, self._stepped_tensors())
        if self.stage in (1, 2):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _stepped_tensors(self) -> list[torch.Tensor]:
        """The tensors that the base optimizer updates: flat fp32 ones under ZeRO."""
        if self.stage == 0:
            return self.trained
        if self.stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return [p for group in self.base_optimizer.param_groups for p in group["params"]]

    # ---- training

    def forward_backward(self, batch: dict[str, Any], alpha: float) -> dict[str, torch.Tensor]:
        outputs = self.engine(batch, alpha=alpha)
        self.engine.backward(outputs["loss"])
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the micro-batch
        return {name: value.detach() for name, value in outputs.items()}

    def step(self, learning_rate: float, momentum: float) -> torch.Tensor:
        if self.stage == 0:
            return super().step(learning_rate, momentum)
        self.set_learning_rate(learning_rate)
        self.apply()
        # -1 stands for infinite where DeepSpeed does not check
        norm = float(self.engine.get_global_grad_norm())
        finite = self.engine.was_step_applied() and norm >= 0
        return torch.full((), norm if finite else math.inf, device=self.device)

    def apply(self) -> None:
        self.engine.step()

    @torch.no_grad()
    def clamp(self, parameter: nn.Parameter, low: float, high: float) -> None:
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

            safe_set_local_fp32_param(parameter, safe_get_local_fp32_param(parameter).clamp(low, high))
            parameter.ds_tensor.clamp_(low, high)
        elif self.stage and parameter._hp_mapping is not None:
            parameter._hp_mapping.hp_fragment.clamp_(low, high)
        if parameter.data.numel():  # also the whole copy, where there is one
            parameter.data.clamp_(low, high)

    # ---- what this rank holds of a parameter

    def local(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter.ds_tensor.data if self.stage == 3 else parameter.data

    def shard(self, parameter: nn.Parameter, full: torch.Tensor) -> torch.Tensor:
        if self.stage != 3:
            return full
        size = parameter.ds_tensor.numel()
        rank = torch.distributed.get_rank(parameter.ds_process_group)
        piece = full.reshape(-1)[rank * size : (rank + 1) * size]
        return nn.functional.pad(piece, (0, size - piece.numel()))

    def gather(self, parameter: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
        if self.stage != 3:
            return local
        ranks = torch.distributed.get_world_size(parameter.ds_process_group)
        whole = local.new_empty(ranks * local.numel())
        torch.distributed.all_gather_into_tensor(whole, local.contiguous(), group=parameter.ds_process_group)
        return whole[: parameter.ds_numel].reshape(parameter.ds_shape)

    def refresh(self, parameters: list[nn.Parameter]) -> None:
        if self.stage == 3:
            whole = [p for p in parameters if getattr(p, "ds_persist", False)]
            if whole:
                whole[0].partition(whole)
                whole[0].all_gather(whole)

    # ---- full fp32 state of a parameter

    def read(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not parameter.requires_grad:
            return self.gather(parameter, self.local(parameter)).float()
        if self.stage == 0:
            return parameter.data if key == WEIGHT else self.base_optimizer.state[parameter][key]
        if key == WEIGHT:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, key)

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, key: str, full: torch.Tensor) -> None:
        from deepspeed import utils

        full = full.to(self.device)
        shard = self.shard(parameter, full)
        if key == WEIGHT:
            self.local(parameter).copy_(shard)
        if not parameter.requires_grad:
            return
        if self.stage == 0 and key != WEIGHT:
            self.base_optimizer.state[parameter][key].copy_(full)
        elif self.stage in (1, 2) and key == WEIGHT:
            utils.safe_set_full_fp32_param(parameter, full)
        elif self.stage in (1, 2):
            utils.safe_set_full_optimizer_state(parameter, full, key)
        elif self.stage == 3 and key == WEIGHT:
            utils.safe_set_local_fp32_param(parameter, shard)
        elif self.stage == 3:
            utils.safe_set_local_optimizer_state(parameter, shard, key)

    def set_step(self, step: int) -> None:
        set_step(self.base_optimizer, step)

    @contextlib.contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        """As in `Engine`; under ZeRO-3 and bf16 each rank holds a whole fp32 copy meanwhile, without hooks."""
        with contextlib.ExitStack() as stack:
            if self.stage == 3 or self.bf16:
                stack.enter_context(self._whole_parameters())
            yield stack.enter_context(super().full_model())

    @contextlib.contextmanager
    def _whole_parameters(self) -> Iterator[None]:
        whole = {}  # one copy of each, so that tied weights stay tied
        for p in self.model.parameters():
            whole[id(p)] = nn.Parameter(self.read(p, WEIGHT).clone(), requires_grad=False)
        kept = [
            (m, name, p) for m in self.model.modules() for name, p in m._parameters.items() if p is not None
        ]
        offload = self.optimizer.parameter_offload if self.stage == 3 else None
        if offload is not None:
            for hook in offload.forward_hooks + offload.backward_hooks:
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
        for module, name, p in kept:
            module._parameters[name] = whole[id(p)]
        try:
            yield
        finally:
            for module, name, p in kept:
                module._parameters[name] = p
            if offload is not None:
                offload._register_deepspeed_module(offload.module)
            distributed.barrier()
