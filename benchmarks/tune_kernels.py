"""Finds the fastest configuration of each kernel on this GPU and rewrites kernels/tables/*.json.

    python benchmarks/tune_kernels.py [--ops NAME ...] [--buckets TEXT ...] [--budget SECONDS] [--output FOLDER]

For every bucket that the cases of benchmarks/ops look up, all configurations of a grid (`GRIDS`) are tried: several
processes compile them, then they are timed in turn over the bucket's cases, and the fastest is kept and written. One
that does not compile, whose results differ from the shipped one's by more than rounding, or that `make aot` would
refuse on this chip, is passed over. In the end a bucket is marked `wins: false` where what would serve in the kernel's
place (`FALLBACKS`) is faster over those cases. Run `make aot` and the tests afterwards: they know the limits of the
chips that are not here.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import geometric_mean
from types import MappingProxyType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks.cases import Case  # noqa: E402
from benchmarks.measure import close, explain, spread, tensors, time_in_turn  # noqa: E402
from benchmarks.worker import collect  # noqa: E402
from blipfast.kernels import aot, table  # noqa: E402

Config = dict[str, Any]
Run = Callable[[], object]
GRIDS: dict[str, dict[str, Sequence[int]]] = {
    "adamw": {"chunk": (8192, 16384, 32768, 65536), "block": (1024, 2048, 4096), "num_warps": (4, 8)},
    "attention": {"BM": (64, 128), "BN": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3)},
    "beam_search": {"BLOCK": (2048, 4096), "num_warps": (2, 4, 8)},
    "cached_attention": {"BN": (16, 32, 64), "num_warps": (1, 2, 4), "num_stages": (1, 2)},
    "contrastive": {"BM": (64, 128), "BN": (32, 64), "num_warps": (4, 8), "num_stages": (2, 3)},
    "gelu_gradient": {
        "ROWS": (8, 16, 32),
        "COLUMNS": (128, 256),
        "num_warps": (4, 8),
        "per_processor": (4, 8, 16),
    },
    "layer_norm": {"elements": (1024, 2048, 4096), "num_warps": (2, 4, 8), "per_processor": (2, 4, 8)},
    "linear_cross_entropy": {"BLOCK": (2048, 4096, 8192), "num_warps": (4, 8, 16), "num_stages": (2, 3)},
    "mlp": {"BN": (128, 256), "BK": (32, 64), "GROUP": (8, 16), "num_warps": (4, 8), "num_stages": (3, 4)},
    "patch_embed": {"BN": (128, 256), "BK": (32, 64), "num_warps": (4, 8), "num_stages": (3, 4)},
}
FEW_ROWS = {"BM": (16, 32), "BN": (16, 32, 64), "num_warps": (1, 2, 4), "num_stages": (1, 2)}
# The modes that are timed of a bucket that has others in training, or is looked up where it is not used; of the rest
# mode forward alone, which tells more clearly what is the same in both, if it looks the bucket up.
TIMED = {
    "contrastive gradient": ("full",),
    "contrastive small": ("forward", "full"),
    "linear_cross_entropy softmax": ("forward", "full"),
}
FALLBACKS = ("ours torch", "sdpa")  # whom `backends` chooses where a kernel does not win
SHOWN = 4  # configurations of a bucket that are printed with their times


def candidates(op: str, bucket: str, shipped: Config) -> list[Config]:
    """The shipped configuration, then the rest of the grid."""
    grid = FEW_ROWS if bucket.endswith(("few", "text")) else GRIDS[op]
    keys = [key for key in shipped if key in grid]
    every = [{**shipped, **dict(zip(keys, values))} for values in itertools.product(*map(grid.get, keys))]
    return [shipped, *(config for config in every if config != shipped)]


class Trial:
    """Serves the kernels' look-ups from memory, so that a candidate is tried without touching a file."""

    def __init__(self, op: str, arch: int) -> None:
        self.op = op
        self.tables = json.loads((table.FOLDER / f"{op}.json").read_text())
        nearest = str(max(known for known in map(int, self.tables) if known <= arch))
        self.buckets: dict[str, Config] = copy.deepcopy(self.tables[nearest])
        self.tables[str(arch)] = self.buckets
        self.asked: set[str] = set()
        self._stored = table._entry

    def __enter__(self) -> Trial:
        self._stored, table._entry = table._entry, self._entry
        return self

    def __exit__(self, *_: object) -> None:
        table._entry = self._stored

    def _entry(self, op: str, arch: int, *buckets: str) -> tuple[MappingProxyType[str, Any], bool]:
        if op != self.op:
            return self._stored(op, arch, *buckets)
        bucket = next((bucket for bucket in buckets if bucket in self.buckets), "default")
        self.asked.add(bucket)
        config = dict(self.buckets[bucket])
        return MappingProxyType(config), config.pop("wins", True)

    def buckets_of(self, run: Run) -> set[str]:
        """Which buckets a run looks up."""
        self.asked.clear()
        run()
        return set(self.asked)

    def using(self, bucket: str, config: Config, run: Run) -> Run:
        """`run` with `config` in that bucket."""

        def wrapped() -> object:
            before, self.buckets[bucket] = self.buckets[bucket], config
            try:
                return run()
            finally:
                self.buckets[bucket] = before

        return wrapped

    def save(self, folder: Path) -> None:
        """The whole table, a line a bucket."""
        arches = []
        for arch, buckets in sorted(self.tables.items(), key=lambda item: int(item[0])):
            lines = [f"    {json.dumps(bucket)}: {json.dumps(config)}" for bucket, config in buckets.items()]
            arches.append(f'  "{arch}": {{\n' + ",\n".join(lines) + "\n  }")
        (folder / f"{self.op}.json").write_text("{\n" + ",\n".join(arches) + "\n}\n")


class Tuning:
    """One operation: its cases, and which of them look up which bucket."""

    def __init__(self, op: str, arch: int, wanted: Sequence[str] = ()) -> None:
        """wanted: parts of the names of the buckets to tune; all by default."""
        self.op, self.arch = op, arch
        self.cases = {i: case for i, case in enumerate(all_cases()) if case.op == op and case.rank < 2}
        self.trial = Trial(op, arch)
        self.of_bucket: dict[str, list[int]] = {}
        with self.trial:
            for i, case in self.cases.items():
                for bucket in self.trial.buckets_of(case.setup()["ours triton"]):
                    if not wanted or any(part in bucket for part in wanted):
                        self.of_bucket.setdefault(bucket, []).append(i)
        for bucket, own in self.of_bucket.items():
            timed = TIMED.get(f"{op} {bucket}", ("forward",))
            self.of_bucket[bucket] = [i for i in own if self.cases[i].mode in timed] or own

    def tune(self, ahead: Ahead, folder: Path) -> None:
        """Keep the fastest configuration of every bucket, and say where another is faster; write each as it is found.

        A bucket for which the time is too short stays as it is.
        """
        tuned = []
        with self.trial:
            for bucket, own in self.of_bucket.items():
                best = self.fastest(bucket, own, ahead)
                if best is None:
                    print(f"{self.op} {bucket}: left as it is, the time is up", flush=True)
                    continue
                self.trial.buckets[bucket] = best
                self.trial.save(folder)
                tuned.append(bucket)
            for bucket in tuned:
                ratio = geometric_mean(against_peers(self.cases[i].setup()) for i in self.of_bucket[bucket])
                print(f"{self.op} {bucket}: the best other takes x{ratio:.3f} of our time", flush=True)
                self.trial.buckets[bucket].pop("wins", None)
                if ratio < 1:
                    self.trial.buckets[bucket]["wins"] = False
                self.trial.save(folder)

    def fastest(self, bucket: str, own: Sequence[int], ahead: Ahead) -> Config | None:
        """The candidate with the least time, as a geometric mean over the cases; prints the best few. None: no time."""
        every = candidates(self.op, bucket, self.trial.buckets[bucket])
        times: dict[int, list[float]] = {i: [] for i in range(len(every))}
        if ahead(compile_one, [(i, bucket, config, self.arch) for i in own for config in every], 4) is None:
            return None
        for case in own:
            run = self.cases[case].setup()["ours triton"]
            able = right({i: self.trial.using(bucket, every[i], run) for i in times})
            measured = time_in_turn(able, "cuda", 0.02)
            times = {i: [*times[i], spread(measured[i])[1]] for i in able}
            torch.cuda.empty_cache()
        order = sorted(times, key=lambda i: geometric_mean(times[i]))
        print(f"{self.op} {bucket}: ms of {', '.join(self.cases[i].shape for i in own)}")
        for i in [*order[:SHOWN], 0]:
            print("  ", *(f"{ms:.4f}" for ms in times[i]), every[i], "(shipped)" * (i == 0), flush=True)
        files = [file for file in aot.operations() if file.startswith(self.op)]
        programs = [(file, n) for file in files for n in range(len(aot.cases(file, self.arch)))]
        for i in order:
            refused = ahead(
                refusals, [(self.op, bucket, every[i], self.arch, *program) for program in programs]
            )
            if refused is None:
                return None
            if not any(refused):
                return every[i]
            print("   refused:", every[i], next(filter(None, refused)), flush=True)
        return every[0]


@functools.cache
def all_cases() -> list[Case]:
    cases, failed = collect("cuda")
    for name, why in failed.items():
        print(f"{name} gave no cases: {why}", file=sys.stderr)
    return cases


def right(runs: dict[int, Run]) -> dict[int, Run]:
    """Those that run, and give what the first gives; 0 is the shipped configuration."""
    want = tensors(runs[0]())
    if not all(torch.equal(a, b) for a, b in zip(tensors(runs[0]()), want, strict=True)):
        want = []  # what draws random numbers cannot be compared
    able = {}
    for i, run in runs.items():
        with contextlib.suppress(Exception):  # does not compile, or needs more than the chip has
            if all(close(a, b) for a, b in zip(tensors(run()), want)):
                able[i] = run
    return able


def against_peers(contenders: dict[str, Run]) -> float:
    """The time of the fastest of those who would serve in its place over that of our kernel."""
    able = {}
    for label in {"ours triton", *FALLBACKS} & contenders.keys():
        with contextlib.suppress(Exception):  # a peer that cannot do this case does not count
            contenders[label]()
            able[label] = contenders[label]
    middle = {label: spread(own)[1] for label, own in time_in_turn(able, "cuda", 0.1).items()}
    ours = middle.pop("ours triton")
    return min(middle.values(), default=float("inf")) / ours


class Ahead:
    """Processes that compile, for all operations the same ones, until the time is up."""

    def __init__(self, processes: int, until: float) -> None:
        self.processes, self.until = processes, until
        self.pool = self._pool()

    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.processes, multiprocessing.get_context("spawn"))

    def __call__(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], chunk: int = 1
    ) -> list[Any] | None:
        """What `function` gives of each task; `chunk` neighbours in one process. None: not done in time."""
        left = self.until - time.monotonic()
        if left <= 0:
            return None
        try:
            return list(self.pool.map(function, tasks, timeout=left, chunksize=chunk))
        except TimeoutError:
            return None
        except BrokenProcessPool:
            self.pool = self._pool()
            raise


def compile_one(task: tuple[int, str, Config, int]) -> None:
    """For the cache on disk: run a case with a configuration in a bucket."""
    place, bucket, config, arch = task
    with contextlib.suppress(Exception), Trial(all_cases()[place].op, arch) as trial:  # told when it is timed
        trial.using(bucket, config, prepared(place))()


def refusals(task: tuple[str, str, Config, int, str, int]) -> list[str]:
    """What forbids shipping one of the programs of an operation, with a configuration in a bucket."""
    op, bucket, config, arch, file, place = task
    with Trial(op, arch) as trial:
        trial.buckets[bucket] = config
        case = aot.cases(file, arch)[place]
    try:
        return aot.problems(case, arch, aot.compile_case(case, arch))
    except Exception as error:  # a compiler's complaint arrives as many types
        return [explain(error)]


@functools.lru_cache(maxsize=1)
def prepared(place: int) -> Run:
    return all_cases()[place].setup()["ours triton"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", help="only these; all that have a table by default")
    parser.add_argument(
        "--buckets", nargs="+", default=[], help="only buckets whose names contain one of these"
    )
    parser.add_argument(
        "--budget", type=float, default=86400, help="seconds in all; what does not fit stays as it is"
    )
    parser.add_argument("--output", type=Path, default=table.FOLDER, help="folder; kernels/tables by default")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("Tuning needs a CUDA GPU; PyTorch sees none.", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    room = int(torch.cuda.get_device_properties(0).total_memory / 12e9)  # they keep what they ran last
    ahead = Ahead(max(1, min(room, (os.cpu_count() or 2) - 1)), time.monotonic() + args.budget)
    status = 0
    for op in args.ops or sorted(path.stem for path in table.FOLDER.glob("*.json")):
        if time.monotonic() > ahead.until:
            print(f"{op}: left as it is, the time is up")
            continue
        try:
            tuning = Tuning(op, arch, args.buckets)
            if not tuning.of_bucket:
                raise ValueError("no case of benchmarks/ops looks up such a bucket")
            tuning.tune(ahead, args.output)
        except Exception as error:  # the other operations can still be tuned
            print(f"{op}: not tuned: {explain(error)}")
            status = 1
        torch.cuda.empty_cache()
    return status


if __name__ == "__main__":
    sys.exit(main())
