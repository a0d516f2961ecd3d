"""AdamW together with the momentum encoders' moving average (EMA), in one pass over memory.

    FusedStep   on lists of tensors, for whoever keeps the optimizer's state elsewhere
    AdamWEma    torch.optim.AdamW with averages: `optimizer.step(momentum=0.995)`

A step is torch.optim.AdamW(fused=True).step(), then torch._foreach_lerp_(averages, params, 1 - momentum), to rounding.
It writes through addresses, which the schema of an operator cannot declare: torch.compile leaves it out of its graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .. import backends
from .checks import check_dtype, check_same_device, check_same_shape
from .launch import tuned
from .library import on_its_gpu

OP = "adamw"
_INTERPRETED = {"chunk": 1024, "block": 256, "num_warps": 4}

backends.register(OP, triton=backends.triton_serves(OP, (torch.float32,)), torch=backends.always)

Some = Sequence[Tensor | None]


class FusedStep:
    """One optimizer step on fixed lists of tensors, which it updates in place.

    params, exp_avgs, exp_avg_sqs, averages: fp32, contiguous, one shape for each index, all on one device. steps: fp32
    scalars, the number of updates done. weight_decay: one number or one for each parameter. None, for a list or within
    one, where there is nothing: a parameter without state is never trained. copies and average_copies (one half
    dtype) receive the rounded params and averages. Raises ValueError for what is otherwise.

    The addresses go to the device once, and again when one has changed (gradients made anew, state loaded).
    Served by: triton, torch.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Some | None = None,
        exp_avg_sqs: Some | None = None,
        steps: Some | None = None,
        *,
        weight_decay: float | Sequence[float] = 0.0,
        averages: Some | None = None,
        copies: Some | None = None,
        average_copies: Some | None = None,
    ):
        n = len(params)

        def filled(values) -> list:
            return [None] * n if values is None else list(values)

        self.params = list(params)
        self.exp_avgs, self.exp_avg_sqs, self.steps = map(filled, (exp_avgs, exp_avg_sqs, steps))
        self.averages, self.copies, self.average_copies = map(filled, (averages, copies, average_copies))
        self.decays = [weight_decay] * n if isinstance(weight_decay, float | int) else list(weight_decay)
        for name in ("exp_avgs", "exp_avg_sqs", "steps", "averages", "copies", "average_copies", "decays"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{OP}: {name} has {len(getattr(self, name))} entries for {n} params")
        halves = {c.dtype for c in [*self.copies, *self.average_copies] if c is not None}
        if len(halves) > 1 or not halves <= set(backends.HALVES):
            raise ValueError(f"{OP}: copies must share one of {list(backends.HALVES)}, got {halves}")
        self.copy_dtype = next(iter(halves), torch.bfloat16)
        for i in range(n):
            self._check(i)
        self._table: tuple[list[int], Tensor, bool] | None = None
        self._chunk = 0  # what _chunks is cut by

    def _check(self, i: int) -> None:
        names = ("params", "exp_avgs", "exp_avg_sqs", "averages")
        fp32 = {f"{name}[{i}]": getattr(self, name)[i] for name in names}
        copies = {f"{name}[{i}]": getattr(self, name)[i] for name in ("copies", "average_copies")}
        present = {name: tensor for name, tensor in (fp32 | copies).items() if tensor is not None}
        step = {f"steps[{i}]": self.steps[i]}
        check_same_shape(OP, **present)
        check_same_device(OP, **({"params[0]": self.params[0]} | present | step))
        check_dtype(OP, (torch.float32,), **fp32, **step)
        for name, tensor in present.items():
            if not tensor.is_contiguous():
                raise ValueError(f"{OP}: {name} must be contiguous; it is updated in place")
        state = (self.exp_avgs[i], self.exp_avg_sqs[i], self.steps[i])
        if self.averages[i] is None and self.average_copies[i] is not None:
            raise ValueError(f"{OP}: average_copies[{i}] has no average to be a copy of")
        if self.averages[i] is self.params[i]:
            raise ValueError(f"{OP}: averages[{i}] is the parameter itself; it must be another tensor")
        if self.steps[i] is not None and self.steps[i].numel() != 1:
            raise ValueError(f"{OP}: steps[{i}] must be one number, got {list(self.steps[i].shape)}")
        if len({tensor is None for tensor in state}) > 1:
            raise ValueError(f"{OP}: params[{i}] needs exp_avg, exp_avg_sq and step, or none of them")

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(
        self,
        grads: Some,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Update everything in place, `steps` too. A parameter whose gradient is None stays; its average still moves.

        grads: fp32, fp16 or bf16, one dtype; what is in them afterwards is not defined. momentum: the averages become
        momentum * average + (1 - momentum) * new weight; None leaves them. grad_scale: fp32 scalar on the device by
        which gradients count, the coefficient of clipping for instance; one that is not finite makes it a step
        without gradients, and the host need not know.
        """
        if not self.params:
            return
        lr = float(lr)  # torch allows a tensor, and so may a scheduler
        grads = self._checked(grads, grad_scale)
        trained = [i for i, grad in enumerate(grads) if grad is not None]
        if trained:
            counted: float | list[Tensor] = 1
            if grad_scale is not None:  # a list, because foreach has the host read a lone tensor
                counted = [grad_scale.isfinite().float().reshape(())] * len(trained)
            torch._foreach_add_([self.steps[i] for i in trained], counted)
        if backends.choose(OP, self.params[0]) == "torch":
            self._torch(grads, trained, lr, betas, eps, momentum, grad_scale)
        else:
            self._triton(grads, trained, lr, betas, eps, momentum, grad_scale)

    def _checked(self, grads: Some, grad_scale: Tensor | None) -> list[Tensor | None]:
        if len(grads) != len(self.params):
            raise ValueError(f"{OP}: {len(grads)} grads for {len(self.params)} params")
        dtypes = set()
        for i, (grad, param, state) in enumerate(zip(grads, self.params, self.exp_avgs)):
            if grad is None:
                continue
            if grad.shape != param.shape or grad.device != param.device or state is None:
                wrong = "has no optimizer state" if state is None else "differs in shape or device"
                raise ValueError(f"{OP}: grads[{i}] {list(grad.shape)} for params[{i}], which {wrong}")
            dtypes.add(grad.dtype)
        if len(dtypes) > 1 or not dtypes <= set(backends.FLOATS):
            raise ValueError(f"{OP}: grads must share one of {list(backends.FLOATS)}, got {dtypes}")
        if grad_scale is not None:
            check_dtype(OP, (torch.float32,), grad_scale=grad_scale)
            check_same_device(OP, params=self.params[0], grad_scale=grad_scale)
            if grad_scale.numel() != 1:
                raise ValueError(f"{OP}: grad_scale must be one number, got {list(grad_scale.shape)}")
        return [grad if grad is None else grad.contiguous() for grad in grads]

    def _torch(self, grads, trained, lr, betas, eps, momentum, grad_scale) -> None:
        divisor = skipped = None
        if grad_scale is not None:
            skipped = 1 - grad_scale.isfinite().float()
            on_gpu = grad_scale.is_cuda  # elsewhere looking at it costs nothing, and a pass is saved
            divisor = grad_scale.reciprocal() if on_gpu or grad_scale != 1 else None
        for decay in sorted(set(self.decays)):
            chosen = [i for i in trained if self.decays[i] == decay]
            if not chosen:
                continue
            lists = (self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.steps)
            params, found, first, second, steps = ([values[i] for i in chosen] for values in lists)
            torch._fused_adamw_(
                params,
                [grad.float() for grad in found],
                first,
                second,
                [],
                steps,
                lr=lr,
                beta1=betas[0],
                beta2=betas[1],
                weight_decay=decay,
                eps=eps,
                amsgrad=False,
                maximize=False,
                grad_scale=divisor,
                found_inf=skipped,
            )
        if momentum is not None:
            pairs = [(a, p) for a, p in zip(self.averages, self.params) if a is not None]
            if pairs:
                torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - momentum)
            _copy(self.average_copies, self.averages)
        _copy(self.copies, self.params)

    def _triton(self, grads, trained, lr, betas, eps, momentum, grad_scale) -> None:
        from ..kernels import adamw as kernel

        config = tuned(OP, "default", self.params[0], _INTERPRETED)
        if self._chunk != config["chunk"]:
            self._chunk, self._chunks = config["chunk"], self._cut(config["chunk"])
        table, aligned = self._addresses(grads)
        if grad_scale is not None:
            table = table.clone()
            table[:, 1] *= grad_scale.isfinite()  # the gradients' addresses: 0, there is none
        dtype = grads[trained[0]].dtype if trained else torch.float32
        on_its_gpu(kernel.step)(
            table,
            *self._chunks,
            grad_scale,
            lr,
            betas,
            eps,
            momentum,
            dtype,
            self.copy_dtype,
            aligned,
            config,
        )

    def _addresses(self, grads: list[Tensor | None]) -> tuple[Tensor, bool]:
        """The table that the kernel reads, [n, 9] int64 on the device, and whether all addresses are aligned."""
        states = (self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.steps)
        columns = (*states, self.averages, self.copies, self.average_copies)
        found = [0 if tensor is None else tensor.data_ptr() for tensors in columns for tensor in tensors]
        if self._table is None or self._table[0] != found:
            rows = torch.tensor(found).view(len(columns), -1)
            sizes = torch.tensor([[p.numel() for p in self.params]])
            table = torch.cat([rows, sizes]).t().contiguous()
            aligned = not bool((rows[[0, 1, 2, 3, 5, 6, 7]] % 16).any())  # a step is a scalar
            device = self.params[0].device
            if device.type == "cuda":  # pinned memory is not reused before the copy is done
                table = table.pin_memory().to(device, non_blocking=True)
            self._table = found, table, aligned
        return self._table[1:]

    def _cut(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Weight decays [n] fp32, and chunks [C, 2] int32: which tensor, which chunk of it."""
        counts = torch.tensor([-(-p.numel() // chunk) for p in self.params])
        tensors = torch.repeat_interleave(torch.arange(len(counts)), counts)
        within = torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]
        chunks = torch.stack([tensors, within], 1).to(torch.int32)
        device = self.params[0].device
        return torch.tensor(self.decays, dtype=torch.float32, device=device), chunks.to(device)


def _copy(targets: Some, sources: Some) -> None:
    pairs = [(target, source) for target, source in zip(targets, sources) if target is not None]
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs)))


class AdamWEma(torch.optim.AdamW):
    """torch.optim.AdamW whose `step(momentum=m)` also moves averages of the weights.

    averages: (weight, average) pairs as `model.momentum_pairs()` gives them, one a weight; a weight that is not
    optimised (frozen) is averaged as well. State, its keys and checkpoints are those of torch.optim.AdamW(fused=True).
    All groups must agree in lr, betas and eps when stepping; weight decay may differ. ValueError otherwise.
    Whoever cannot pass arguments to `step`, as DeepSpeed, sets the attributes `momentum` and `grad_scale` instead.
    """

    def __init__(
        self,
        params: Iterable,
        averages: Iterable[tuple[Tensor, Tensor]] = (),
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self._step_supports_amp_scaling = False  # a GradScaler unscales before it calls step
        self.momentum: float | None = None
        self.grad_scale: Tensor | None = None
        self._pairs = list(averages)
        if len({id(weight) for weight, _ in self._pairs}) < len(self._pairs):
            raise ValueError(f"{OP}: a weight has two averages; it may have one")
        self._fused: tuple[list[object], FusedStep] | None = None

    def __getstate__(self) -> dict:  # torch's leaves out what a subclass has, of which copies are made, too
        own = ("_pairs", "momentum", "grad_scale", "_step_supports_amp_scaling")
        return super().__getstate__() | {name: getattr(self, name) for name in own} | {"_fused": None}

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], object] | None = None,
        *,
        momentum: float | None = None,
        grad_scale: Tensor | None = None,
    ):
        """One update; `momentum` and `grad_scale` as in FusedStep. Without momentum the averages stay."""
        momentum = self.momentum if momentum is None else momentum
        grad_scale = self.grad_scale if grad_scale is None else grad_scale
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        settings = [{key: group[key] for key in ("lr", "betas", "eps")} for group in self.param_groups]
        if any(setting != settings[0] for setting in settings):
            raise ValueError(f"{OP}: parameter groups must agree in lr, betas and eps")
        for setting in ("maximize", "amsgrad"):
            if any(group.get(setting) for group in self.param_groups):
                raise ValueError(f"{OP}: AdamWEma has no {setting}; use torch.optim.AdamW")
        trained = [p for group in self.param_groups for p in group["params"]]
        fused = self._built(trained)
        grads = [p.grad for p in trained] + [None] * (len(fused.params) - len(trained))
        fused(grads, **settings[0], momentum=momentum, grad_scale=grad_scale)
        return loss

    def _built(self, trained: list[Tensor]) -> FusedStep:
        """The FusedStep for the present state; a new one after loading a checkpoint or changing groups."""
        for p in trained:
            if not self.state[p]:
                moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                self.state[p].update(step=torch.zeros((), device=p.device), **moments)
        states = [[self.state[p][key] for p in trained] for key in ("exp_avg", "exp_avg_sq", "step")]
        decays = [group["weight_decay"] for group in self.param_groups for _ in group["params"]]
        present = [*decays, *map(id, trained), *(id(tensor) for tensors in states for tensor in tensors)]
        if self._fused is None or self._fused[0] != present:
            averages = {id(weight): average for weight, average in self._pairs}
            known = set(map(id, trained))
            frozen = [weight for weight, _ in self._pairs if id(weight) not in known]
            params, none = trained + frozen, [None] * len(frozen)
            fused = FusedStep(
                params,
                *(tensors + none for tensors in states),
                weight_decay=decays + [0.0] * len(frozen),
                averages=[averages.get(id(p)) for p in params],
            )
            self._fused = present, fused
        return self._fused[1]
