"""What one benchmark case is, and helpers to write them.

Every file of `benchmarks/ops`, single operations, and `benchmarks/models`, whole models, gives
`cases(device) -> list[Case]`:

    from benchmarks.cases import compiled, modes, ours

    def cases(device):
        def make():                                    # called just before the case runs
            x = torch.randn(...).requires_grad_()
            contenders = ours("layer_norm", device, layer_norm) | {"eager": eager} | compiled(device, eager)
            return contenders, (x, weight, bias)
        return modes("layer_norm", "T14775 D768", torch.bfloat16, make, forward=(flops, bytes), full=(flops, bytes))

On a CPU a case is tiny: it shows that the code runs and how the PyTorch path stands beside eager.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.targets import Target

MODES = ("forward", "full")


@dataclass(frozen=True)
class Case:
    """One shape of one operation in one mode, and everybody who can do it.

    op: name in `blipfast.ops`, or what a model does. shape: for people, e.g. "B75 N197 D768". dtype: of the
    activations.
    setup() -> {label: function of no arguments}; labels: "ours triton", "ours torch", "eager", "compiled", and
    whatever else serves ("sdpa", "flash_attn", "xformers", "foreach", "apex"); of models "ours", "reference",
    "transformers". It leaves out who is not installed.
    flops, bytes: what the mathematics needs in this mode, not what an implementation spends; 0: not of interest.
    mode: "forward" (no gradients wanted) or "full" (forward and backward).
    rank: 0 for the shapes that a target is stated for, 1 for the rest of BLIP base, 2 for what may be left out.
    items: of a model, the pictures, pairs or questions of a call, which is timed by the clock on the wall, host
    included; 0: an operation, which is timed by the GPU's.
    parts: the work of how many calls a target in seconds means. remark: what to know about the figures.
    targets: what our figures should reach; for a GPU.
    """

    op: str
    shape: str
    dtype: torch.dtype
    setup: Callable[[], dict[str, Callable[[], object]]]
    flops: float
    bytes: float
    mode: str = "forward"
    rank: int = 1
    items: int = 0
    parts: float = 1.0
    remark: str = ""
    targets: tuple[Target, ...] = ()


Contenders = dict[str, Callable[..., object]]


def modes(
    op: str,
    shape: str,
    dtype: torch.dtype,
    make: Callable[[], tuple[Contenders, tuple[Tensor, ...]]],
    *,
    forward: tuple[float, float],
    full: tuple[float, float] | None = None,
    rank: int = 1,
    targets: tuple[Target, ...] = (),
    full_targets: tuple[Target, ...] | None = None,
) -> list[Case]:
    """The case in mode forward and, if `full` is given, in mode full; both are (flops, bytes).

    make() -> ({label: f}, inputs): f(*inputs) gives a tensor or a tuple of tensors; mode full differentiates
    them, with fixed random gradients, in those inputs that require it. targets: of both modes, unless mode full has
    its own.
    """
    found = [Case(op, shape, dtype, partial(_forward, make), *forward, "forward", rank, targets=targets)]
    if full:
        targets = targets if full_targets is None else full_targets
        found.append(Case(op, shape, dtype, partial(_full, make), *full, "full", rank, targets=targets))
    return found


def _forward(make):
    contenders, inputs = make()
    return {label: torch.no_grad()(partial(f, *inputs)) for label, f in contenders.items()}


def _full(make):
    contenders, inputs = make()
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]

    def step(f, seeds: list[Tensor]):
        outputs = f(*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else [y for y in outputs if y.requires_grad]
        if not seeds:  # made in the warm-up, once a contender
            seeds.extend(torch.randn(y.shape, dtype=y.dtype, device=y.device) for y in outputs)
        return torch.autograd.grad(outputs, wanted, seeds, allow_unused=True)

    return {label: partial(step, f, []) for label, f in contenders.items()}


def served(op: str, backend: str, function: Callable[..., object]) -> Callable[..., object]:
    """`function` with `op` served by `backend` ("triton", "torch", ...)."""
    from blipfast import backends

    def run(*inputs):
        with backends.use(**{op: backend}):
            return function(*inputs)

    return run


def ours(op: str, device: str, function: Callable[..., object]) -> Contenders:
    """The contenders that every case has: our PyTorch path, and on a GPU our kernel before it."""
    names = ("triton", "torch") if device == "cuda" else ("torch",)
    return {f"ours {name}": served(op, name, function) for name in names}


def compiled(device: str, function: Callable[..., object]) -> Contenders:
    """{"compiled": function under torch.compile} on a GPU; nothing on a CPU, where a tiny case compiles for long."""
    return {"compiled": torch.compile(function, dynamic=False)} if device == "cuda" else {}


def built_late(build: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """A contender that `build` makes when it is first called: whoever cannot be built then fails alone."""
    built = cache(build)
    return lambda: built()()


def size(dtype: torch.dtype) -> int:
    """Bytes of one element."""
    return torch.empty((), dtype=dtype).element_size()
