"""Which implementation serves which operation on which device, and how to overrule it.

    with backends.use("torch"): ...                      every operation, this thread or task
    with backends.use(attention="sdpa"): ...             one of them
    BLIPFAST_BACKEND=torch                               the whole process
    BLIPFAST_BACKEND=attention=sdpa,layer_norm=triton

Backends: "triton" (our kernels), "torch" (plain PyTorch, every device); attention also has "sdpa", "flash_attn" and
"xformers". Without an override the first one wins, in the order its operation registered them, that serves the tensor.
A function under torch.compile keeps the choice made when it was traced.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar

import torch
from torch import Tensor

from .kernels import table

VARIABLE = "BLIPFAST_BACKEND"
NAMES = ("triton", "torch", "sdpa", "flash_attn", "xformers")
LIBRARIES = ("triton", "flash_attn", "xformers")  # backends that are packages of the same name
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)

Predicate = Callable[[Tensor], bool]
ONE_KIND = {"": (1, 1, 64)}

logger = logging.getLogger(__name__)
_registry: dict[str, dict[str, Predicate]] = {}
_kinds: dict[str, Mapping[str, tuple[int, ...]]] = {}
_overrides: ContextVar[tuple[dict[str, str], ...]] = ContextVar("blipfast_backends", default=())
_said: set[tuple[str, str]] = set()


def register(op: str, kinds: Mapping[str, tuple[int, ...]] = ONE_KIND, /, **available: Predicate) -> None:
    """Make the backends of an operation known, best first; each with what it serves by default. At import of an op.

    kinds: what it is asked for, where that decides who serves: a name, and the shape of a tensor of this kind.
    """
    unknown = sorted(set(available) - set(NAMES))
    if unknown:
        raise ValueError(f"{op}: {unknown} are not backends; choose among {list(NAMES)}")
    _registry[op], _kinds[op] = available, kinds


def always(tensor: Tensor) -> bool:
    """The predicate of a backend that serves every tensor."""
    return True


def triton_serves(op: str, dtypes: tuple[torch.dtype, ...] = FLOATS, bucket: str = "default") -> Predicate:
    """The usual predicate of "triton": on CUDA, installed, of these dtypes, and not slower by `op`'s tuned table."""

    def serves(tensor: Tensor) -> bool:
        return tensor.is_cuda and tensor.dtype in dtypes and _wins(op, tensor.device.index, bucket)

    return serves


def choose(op: str, tensor: Tensor) -> str:
    """The name of the backend that serves `op` for this tensor.

    Raises ValueError if the override names a backend that `op` does not have, that is not installed, or that cannot
    run on this tensor.
    """
    forced = _forced(op)
    if forced is not None:
        if forced == "triton" and not tensor.is_cuda:
            _check_interpreter(op, tensor)
        return forced
    for name, serves in _registry[op].items():
        if serves(tensor):
            if tensor.is_cuda and not torch.compiler.is_compiling():
                _say(op, name)
            return name
    raise ValueError(
        f"{op}: no backend serves {tensor.dtype} on {tensor.device}; it has {list(_registry[op])}"
    )


@contextlib.contextmanager
def use(default: str | None = None, **by_op: str) -> Iterator[None]:
    """Overrule the choice within a `with` block: `default` for every operation that has it, `by_op` for single ones.

    Inner blocks win over outer ones and over the environment. Raises ValueError for an operation that is not there;
    backends are checked when an operation is called.
    """
    _check_operations(by_op)
    asked = by_op if default is None else {"": default, **by_op}
    token = _overrides.set((*_overrides.get(), asked))
    try:
        yield
    finally:
        _overrides.reset(token)


def asked() -> tuple[tuple[dict[str, str], ...], str | None]:
    """What overrules the choices at present: that of `use`, and the environment's."""
    return _overrides.get(), os.environ.get(VARIABLE)


def recompute_contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """`context_fn` of torch.utils.checkpoint: what is recomputed, on a thread of autograd's, is served as at first."""
    present = _overrides.get()

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        token = _overrides.set(present)
        try:
            yield
        finally:
            _overrides.reset(token)

    return contextlib.nullcontext(), again()


def describe() -> list[tuple[str, str, str, str]]:
    """(operation and kind, device, backend, why) of every operation on the CPU and, if there is one, the GPU."""
    rows = []
    kinds = [(op, kind, shape) for op, shapes in sorted(_kinds.items()) for kind, shape in shapes.items()]
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        for op, kind, shape in kinds:
            name, probe = f"{op} {kind}".strip(), torch.empty(shape, device=device, dtype=dtype)
            try:
                rows.append((name, device, choose(op, probe), _why(op, probe)))
            except ValueError as error:
                rows.append((name, device, "none", str(error)))
    return rows


def constant_when_compiled(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, without its import of torch._dynamo: that takes as long as torch's own."""
    function._dynamo_marked_constant = True
    return function


def interpreting() -> bool:
    """Whether Triton kernels are interpreted on the CPU, for tests (TRITON_INTERPRET=1 before they are imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@constant_when_compiled
@functools.cache
def installed(package: str) -> bool:
    """Whether a package can be imported; looks without importing it."""
    return importlib.util.find_spec(package) is not None


@constant_when_compiled
@functools.cache
def arch(device: int | None = None) -> int:
    """Compute capability of a CUDA device as one number: 80, 90, ..."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@constant_when_compiled
def _wins(op: str, device: int | None, bucket: str) -> bool:
    return installed("triton") and table.wins(op, arch(device), bucket)


@constant_when_compiled
def _forced(op: str) -> str | None:
    """What an override asks of `op`; the innermost wins, and in each the operation's own name over the default."""
    overrides, environment = asked()
    if not overrides and not environment:
        return None
    for override in (*reversed(overrides), _environment(environment or "")):
        name = override.get(op)
        if name is None:
            name = override.get("")
            if name is None or (name in NAMES and name not in _registry[op]):
                continue
        _check(op, name)
        return name
    return None


def _check_operations(names: Iterable[str]) -> None:
    for name in names:
        # an operation that is not imported yet has a table
        if name not in _registry and not (table.FOLDER / f"{name}.json").exists():
            known = _registry.keys() | {file.stem for file in table.FOLDER.glob("*.json")}
            raise ValueError(f"{name!r} is no operation that has backends; there are {sorted(known)}")


@functools.cache
def _environment(text: str) -> dict[str, str]:
    """BLIPFAST_BACKEND as a dict; the name for all is under ""."""
    asked = {}
    for word in filter(None, map(str.strip, text.split(","))):
        op, _, name = word.rpartition("=")
        asked[op.strip()] = name.strip()
    _check_operations(op for op in asked if op)
    return asked


def _check(op: str, name: str) -> None:
    choices = [known for known in _registry[op] if known not in LIBRARIES or installed(known)]
    if name not in _registry[op]:
        raise ValueError(f"{op} has no backend {name!r}; here it has {choices}")
    if name not in choices:
        raise ValueError(
            f"{op}: backend {name!r} is not installed (pip install {name}); here there are {choices}"
        )


def _check_interpreter(op: str, tensor: Tensor) -> None:
    if not interpreting():
        raise ValueError(
            f"{op}: backend 'triton' needs a CUDA tensor, got one on {tensor.device}. "
            "Use 'torch'; tests set TRITON_INTERPRET=1 before the kernels are imported."
        )
    if tensor.dtype == torch.bfloat16:
        raise ValueError(
            f"{op}: Triton's interpreter computes bfloat16 wrongly; use float16 or float32 on the CPU"
        )


def _why(op: str, tensor: Tensor) -> str:
    if _forced(op) is not None:
        return f"asked for by use() or {VARIABLE}"
    served = [name for name, serves in _registry[op].items() if serves(tensor)]
    passed = [name for name in _registry[op] if name not in served]
    missing = [name for name in passed if name in LIBRARIES and not installed(name)]
    others = [name for name in passed if name not in missing]
    reasons = ["first choice of " + ", ".join(served)]
    if missing:
        reasons.append("not installed: " + ", ".join(missing))
    if others:
        reasons.append("not for this device or not faster: " + ", ".join(others))
    return "; ".join(reasons)


def _say(op: str, name: str) -> None:
    if (op, name) not in _said:
        _said.add((op, name))
        logger.info("%s is served by %s", op, name)
