"""Times the contenders of a case, in turn, and says what a GPU could do at best in the same run."""

from __future__ import annotations

import contextlib
import gc
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import quantiles

import torch

from benchmarks.cases import Case

Functions = dict[str, Callable[[], object]]
FLUSH = 256 * 2**20  # bytes written between two timings: more than any L2 cache holds
OUT_OF_TIME = "not run: out of time"  # a row's note
NO_TIME_LEFT = "the case's time is up"
CYCLES = 2e9  # of a GPU's clock in a second, or fewer
PATIENCE = 45.0  # seconds for a contender's first call, which builds and compiles
LONG = 25.0  # times `seconds` may all rounds take where one takes more than a second
LEAST = 4  # rounds of those, with that which warms up


@dataclass(frozen=True)
class Ceiling:
    """What the machine reaches: TFLOP/s of a large bf16 product, GB/s (read and written) of a large copy."""

    tflops: float
    gbps: float


@dataclass
class Row:
    """One contender of one case. Times in ms; ratio: its time over that of our fastest path, round by round; note: why
    there is no time.

    ceiling: the share of its time that the ceilings ask for, by FLOPs or by bytes, whichever is more.
    per_second: items of a model. targets, in our row: each with its verdict, joined by "; ". remark: of the case.
    """

    op: str
    shape: str
    dtype: str
    mode: str
    contender: str
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    ceiling: float | None = None
    peak_mib: float | None = None
    ratio_p20: float | None = None
    ratio_p50: float | None = None
    ratio_p80: float | None = None
    per_second: float | None = None
    rounds: int = 0
    targets: str = ""
    remark: str = ""
    note: str = ""


def measure(
    case: Case, device: str, ceiling: Ceiling, seconds: float = 0.4, limit: float = float("inf")
) -> list[Row]:
    """A row for every contender; one that fails gets a note instead of times. Takes about `seconds` a contender.

    Every round runs each of them once, so that what slows the machine slows all alike. Of operations on a GPU, the L2
    cache is overwritten before every call, outside the timing. limit: seconds in all; those that would leave too few
    of them to time the ones before are passed over.
    """
    deadline = time.monotonic() + limit
    reserve = LONG * seconds  # what timing those that are ready will take
    rows, ready = {}, {}
    for label, function in case.setup().items():
        rows[label] = row = blank(case, label)
        try:
            with at_most(min(PATIENCE, deadline - reserve - time.monotonic())):
                function()  # compiles what there is to compile
                row.peak_mib, again = _second_call(function, device)
            if time.monotonic() + reserve + LEAST * again > deadline:
                raise TimeoutError(NO_TIME_LEFT)
            reserve += LEAST * again
            ready[label] = function
        except Exception as error:  # one contender's trouble is not the others'
            row.note = explain(error)
    if ready:
        times = time_in_turn(ready, device, seconds, by_wall=bool(case.items))
        ours = [label for label in times if label.startswith("ours")]
        fastest = min(ours, key=lambda label: spread(times[label])[1], default=None)
        for label, own in times.items():
            _fill(rows[label], case, own, times.get(fastest), ceiling)
    own = [row for row in rows.values() if row.contender.startswith("ours")]
    if own:
        best = min((row for row in own if row.ms_p50), key=lambda row: row.ms_p50, default=None)
        told = best or own[0]
        told.remark = case.remark
        told.targets = "; ".join(target.judge(best, rows.values(), case.parts) for target in case.targets)
    return list(rows.values())


def time_in_turn(
    functions: Functions, device: str, seconds: float, by_wall: bool = False
) -> dict[str, list[float]]:
    """Milliseconds of every call, round by round, in about `seconds` a function.

    by_wall: of the clock on the wall, from an idle GPU to an idle GPU, instead of the GPU's own.
    """
    rounds = _rounds_on_gpu if device == "cuda" and not by_wall else partial(_rounds_by_wall, device)
    for count in (1, 2):  # to warm up, and to see how long one takes
        start = time.perf_counter()
        rounds(functions, count)
        one = (time.perf_counter() - start) / count
        if one > 1:
            return rounds(functions, max(3, min(10, int(LONG * seconds / one))))
    least = 5 if by_wall else 10
    return rounds(functions, round(min(200, max(least, len(functions) * seconds / one))))


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError within the block once the time is up, or before it. For the main thread, where SIGALRM exists."""
    if seconds <= 0:
        raise TimeoutError(NO_TIME_LEFT)

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:.3g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def blank(case: Case, contender: str, note: str = "") -> Row:
    """A row without figures."""
    return Row(case.op, case.shape, str(case.dtype).removeprefix("torch."), case.mode, contender, note=note)


def explain(error: BaseException) -> str:
    """An exception in one line of at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def spread(values: list[float]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % quantiles."""
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def tensors(result: object) -> list[torch.Tensor]:
    """Copies of the tensors that a contender gave."""
    found = [result] if isinstance(result, torch.Tensor) else list(result or [])
    return [x.clone() for x in found if isinstance(x, torch.Tensor)]


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal but for the order of sums: relative to the largest value, as errors of products are."""
    if not want.is_floating_point():
        return torch.equal(got, want)
    scale = want.abs().max().float().clamp_min(1e-30) if want.numel() else 1.0
    return bool(((got.float() - want.float()).abs() <= 0.02 * scale).all())


def measure_ceiling(device: str) -> Ceiling:
    """The best of several products of 8192 x 8192 bf16 matrices and copies of 2 GiB; small fp32 ones on a CPU."""
    on_gpu = device == "cuda"
    n, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**31 if on_gpu else 2**24, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    functions = {"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}
    times = time_in_turn(functions, device, 0.3)
    product, copy = (spread(times[name])[0] for name in functions)
    return Ceiling(2 * n**3 / product / 1e9, 2 * source.numel() / copy / 1e6)


def _fill(row: Row, case: Case, own: list[float], fastest: list[float] | None, ceiling: Ceiling) -> None:
    row.rounds = len(own)
    row.ms_p20, row.ms_p50, row.ms_p80 = spread(own)
    row.per_second = case.items / row.ms_p50 * 1e3 if case.items else None
    row.tflops, row.gbps = case.flops / row.ms_p50 / 1e9, case.bytes / row.ms_p50 / 1e6
    row.ceiling = max(row.tflops / ceiling.tflops, row.gbps / ceiling.gbps)
    if fastest:
        ratios = [a / b for a, b in zip(own, fastest, strict=True)]
        row.ratio_p20, row.ratio_p50, row.ratio_p80 = spread(ratios)


def _second_call(function: Callable[[], object], device: str) -> tuple[float | None, float]:
    """MiB of a GPU that a call takes beyond what was there before it; and its seconds."""
    on_gpu = device == "cuda"
    if on_gpu:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    function()
    if on_gpu:
        torch.cuda.synchronize()
    again = time.perf_counter() - start
    return (torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else None, again


def _rounds_on_gpu(functions: Functions, count: int) -> dict[str, list[float]]:
    """By CUDA events, after the L2 cache was overwritten. The GPU waits until the host has launched what is timed."""
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    pairs = {label: [] for label in functions}
    ahead = dict.fromkeys(functions, 1e-3)  # seconds that the host took to launch it last time
    for _ in range(count):
        for label, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(int(CYCLES * min(0.02, 1.5 * ahead[label])))
            start.record()
            began = time.perf_counter()
            function()
            ahead[label] = time.perf_counter() - began
            end.record()
            pairs[label].append((start, end))
            torch.cuda.synchronize()  # a full queue would be counted as launching
    return {label: [start.elapsed_time(end) for start, end in own] for label, own in pairs.items()}


def _rounds_by_wall(device: str, functions: Functions, count: int) -> dict[str, list[float]]:
    """By the clock on the wall; every call begins and ends with an idle GPU."""
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = {label: [] for label in functions}
    for _ in range(count):
        for label, function in functions.items():
            finish()
            start = time.perf_counter()
            function()
            finish()
            times[label].append(1e3 * (time.perf_counter() - start))
    return times
