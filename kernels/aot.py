"""Compile every shipped configuration for GPUs that are not here, and say what it takes of a chip.

    python -m blipfast.kernels.aot [--op layer_norm ...] [--arch 80 90] [--json]

A kernel file exposes `aot_cases(arch) -> list[AotCase]`. ptxas comes with Triton, so no GPU and no CUDA are needed, but
the kernels must not be interpreted: TRITON_INTERPRET must not be set. `--json` prints one object a line and always
exits 0 once all was compiled; the table exits 1 if a case has a problem.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

ARCHES = (80, 90)
# bytes of shared memory that one program may use: 163 and 227 KiB, and on GPUs that are not for data centres 99
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 120: 101376}
DIVISIBLE = [["tt.divisibility", 16]]


@dataclasses.dataclass(frozen=True)
class AotCase:
    """One configuration of one `@triton.jit` function.

    name: for people, such as "layer_norm fwd bf16 D=1024"
    signature: type of every argument that is not constexpr: "*bf16", "fp32", "i32", "i64". "i32:16" is an integer that
        will be a multiple of 16 at run time (a stride, a row length), "i32:1" one that will be 1; a pointer always
        counts as aligned. Write plain "i32" for what varies or is in do_not_specialize.
    constexprs: values of the constexpr arguments, and None for pointers that are not given
    tensor_cores: True if the dot products must become wgmma on sm_90 and mma.sync on sm_80; "mma" if mma.sync is
        enough on both (tiles of fewer than 64 rows)
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool | Literal["mma"] = False


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a compiled program takes: registers a thread, bytes of shared memory, bytes of spills a thread; and how many
    tensor-core instructions it has."""

    registers: int
    shared: int
    spills: int
    hmma: int
    wgmma: int


def compile_case(case: AotCase, arch: int) -> Resources:
    """Compile for `arch` (80, 90, ...) with the alignment that the runtime would infer. Takes 0.2 to 3 seconds."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attrs = {}, dict(case.constexprs), {}
    for position, name in enumerate(case.fn.arg_names):
        kind, _, hint = ("constexpr" if name in constants else case.signature[name]).partition(":")
        if hint == "1":
            kind, constants[name] = "constexpr", 1
        elif hint == "16" or kind.startswith("*"):
            attrs[(position,)] = DIVISIBLE
        signature[name] = kind
    compiled = triton.compile(
        ASTSource(case.fn, signature, constants, attrs),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    registers, spills = _usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Resources(
        registers=registers,
        shared=compiled.metadata.shared,
        spills=spills,
        hmma=len(re.findall(r"\bmma\.sync", ptx)),
        wgmma=len(re.findall(r"\bwgmma\.mma_async", ptx)),
    )


def spills_allowed() -> int:
    """Bytes: none by the Triton with which the configurations were chosen; its predecessors keep less in registers."""
    major, minor = map(int, importlib.metadata.version("triton").split(".")[:2])
    return 0 if (major, minor) >= (3, 9) else 64


def problems(case: AotCase, arch: int, resources: Resources) -> list[str]:
    """What forbids shipping a configuration: spills, too much shared memory, no tensor cores where they are meant."""
    found = []
    if resources.spills > spills_allowed():
        found.append(f"{resources.spills} bytes of spills")
    limit = SHARED_LIMIT.get(arch, max(SHARED_LIMIT.values()))
    if resources.shared > limit:
        found.append(f"{resources.shared} bytes of shared memory, the chip has {limit}")
    wants_wgmma = case.tensor_cores is True and arch == 90
    if case.tensor_cores and not (resources.wgmma or (resources.hmma and not wants_wgmma)):
        found.append(f"no {'wgmma' if wants_wgmma else 'mma'} instruction")
    return found


def operations() -> list[str]:
    """The kernel files, by name."""
    own = {"aot", "table"}
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name not in own)


def cases(op: str, arch: int) -> list[AotCase]:
    """What `kernels/<op>.py` ships for `arch`; nothing for a file of helpers that has no `aot_cases`."""
    module = importlib.import_module(f"blipfast.kernels.{op}")
    return module.aot_cases(arch) if hasattr(module, "aot_cases") else []


def rows(ops: Sequence[str], arches: Sequence[int], jobs: int) -> Iterator[dict[str, Any]]:
    """Compile everything in `jobs` processes: one dict a case, with what it takes and what is wrong with it."""
    todo = [(op, arch, i) for op in ops for arch in arches for i in range(len(cases(op, arch)))]
    if jobs == 1:
        yield from map(_row, todo)
        return
    context = multiprocessing.get_context("spawn")  # a forked child would share Triton's threads
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        yield from pool.map(_row, todo, chunksize=4)


def _row(which: tuple[str, int, int]) -> dict[str, Any]:
    op, arch, i = which
    case = cases(op, arch)[i]
    row = {"op": op, "arch": arch, "case": case.name, "warps": case.num_warps, "stages": case.num_stages}
    try:
        resources = compile_case(case, arch)
    except Exception as error:  # a compiler's complaint arrives as many types
        return {**row, "problems": [f"does not compile: {type(error).__name__}: {error}"]}
    return {**row, **dataclasses.asdict(resources), "problems": problems(case, arch, resources)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", default=operations(), help="kernel files; all by default")
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHES), help="80 90 by default")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=cores, help="processes; one a core by default")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    from ..backends import interpreting

    if interpreting():
        parser.error("TRITON_INTERPRET is set, so nothing can be compiled; unset it")
    columns = ("registers", "shared", "spills", "hmma", "wgmma")
    line = "{:14} {:44} {:>5} {:>5} {:>6} " + "{:>9} " * len(columns)
    if not args.json:
        print(line.format("op", "case", "arch", "warps", "stages", *columns))
    failed = False
    for row in rows(args.op, args.arch, args.jobs):
        failed = failed or bool(row["problems"])
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        keys = ("op", "case", "arch", "warps", "stages", *columns)
        print(line.format(*(row.get(key, "-") for key in keys)), "; ".join(row["problems"]), flush=True)
    return int(failed and not args.json)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack and local memory: what a kernel without recursion spills."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


if __name__ == "__main__":
    sys.exit(main())
