"""Finds the fastest configuration of each kernel on this GPU and rewrites kernels/tables/*.json.

    python benchmarks/tune_kernels.py [--ops NAME ...] [--minutes 10] [--output FOLDER]

Starts from the table's configuration and moves to a neighbour (one number doubled, halved, or a stage more or less)
as long as one is at least 1 % faster over the cases of benchmarks/ops that use that bucket, candidate and incumbent run
in turn. A neighbour is passed over if it does not compile, or if its results differ from the first configuration's by
more than rounding. In the end the buckets are marked `wins: false` where PyTorch is faster over those cases. Run
`make aot` and the tests afterwards: they know the limits of the chips that are not here.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean
from types import MappingProxyType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks.cases import Case  # noqa: E402
from benchmarks.measure import close, explain, spread, tensors, time_in_turn  # noqa: E402
from benchmarks.worker import collect  # noqa: E402
from blipfast.kernels import table  # noqa: E402

Config = dict[str, Any]
Run = Callable[[], object]
LIMITS = {"num_warps": (1, 16), "num_stages": (1, 6)}
GAIN = 0.99  # a neighbour must take less than this share of the incumbent's time


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations that differ in one number: half or double of it, or one more or less of num_stages."""
    for key, value in config.items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        low, high = LIMITS.get(key, (1, 2**16))
        for other in (value - 1, value + 1) if key == "num_stages" else (value // 2, value * 2):
            if low <= other <= high:
                yield {**config, key: other}


def climb(start: Config, time_ratio: Callable[[Config, Config], float], until: float) -> Config:
    """The configuration from which no neighbour leads further up, or the best one when the time is over.

    time_ratio(candidate, incumbent): the candidate's time over the incumbent's; infinity if it cannot serve.
    """
    best, tried = start, [start]
    improved = True
    while improved:
        improved = False
        for candidate in neighbours(best):
            if time.monotonic() > until:
                return best
            if candidate in tried:
                continue
            tried.append(candidate)
            ratio = time_ratio(candidate, best)
            if ratio < GAIN:
                print(f"    {candidate}  x{1 / ratio:.3f}", flush=True)
                best, improved = candidate, True
                break
    return best


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
        table._entry = self._entry
        return self

    def __exit__(self, *_: object) -> None:
        table._entry = self._stored

    def _entry(self, op: str, arch: int, bucket: str) -> tuple[MappingProxyType[str, Any], bool]:
        if op != self.op:
            return self._stored(op, arch, bucket)
        bucket = bucket if bucket in self.buckets else "default"
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


def tune(op: str, cases: Sequence[Case], arch: int, seconds: float, folder: Path) -> None:
    """Tune every bucket of one operation that its cases look up, and write its table."""
    until = time.monotonic() + seconds
    setups = [case.setup() for case in cases if case.rank < 2]
    setups = [contenders for contenders in setups if "ours triton" in contenders]
    with Trial(op, arch) as trial:
        runs = [contenders["ours triton"] for contenders in setups]
        used = [trial.buckets_of(run) for run in runs]
        for bucket in sorted(set().union(*used)):
            print(f"{op} {bucket}: {trial.buckets[bucket]}", flush=True)
            own = [run for run, buckets in zip(runs, used) if bucket in buckets]
            trial.buckets[bucket] = climb(trial.buckets[bucket], _timer(trial, bucket, own), until)
        for bucket in sorted(set().union(*used)):
            peers = [contenders for contenders, buckets in zip(setups, used) if bucket in buckets]
            ratio = geometric_mean(map(_against_peers, peers))
            print(f"{op} {bucket}: the best other takes x{ratio:.3f} of our time", flush=True)
            trial.buckets[bucket].pop("wins", None)
            if ratio < 1:
                trial.buckets[bucket]["wins"] = False
        trial.save(folder)


def _timer(trial: Trial, bucket: str, runs: list[Run]) -> Callable[[Config, Config], float]:
    """time_ratio for `climb`: the geometric mean over the cases."""
    wanted = [tensors(run()) for run in runs]
    for i, run in enumerate(runs):  # what draws random numbers cannot be compared
        if not all(torch.equal(a, b) for a, b in zip(tensors(run()), wanted[i], strict=True)):
            wanted[i] = []

    def time_ratio(candidate: Config, incumbent: Config) -> float:
        ratios = []
        for run, want in zip(runs, wanted):
            contenders = {
                name: trial.using(bucket, c, run) for name, c in {"new": candidate, "old": incumbent}.items()
            }
            try:
                got = tensors(contenders["new"]())
                if not all(close(a, b) for a, b in zip(got, want)):
                    print(f"    {candidate}: other results")
                    return float("inf")
            except Exception as error:  # does not compile, or needs more than the chip has
                print(f"    {candidate}: {explain(error)}")
                return float("inf")
            times = time_in_turn(contenders, "cuda", 0.15)
            ratios.append(spread([a / b for a, b in zip(times["new"], times["old"])])[1])
        return geometric_mean(ratios)

    return time_ratio


def _against_peers(contenders: dict[str, Run]) -> float:
    """The time of the fastest other contender over ours."""
    able = {label: run for label, run in contenders.items() if _runs(run)}
    times = time_in_turn(able, "cuda", 0.3)
    middle = {label: spread(own)[1] for label, own in times.items()}
    ours = middle.pop("ours triton")
    return min(middle.values(), default=float("inf")) / ours


def _runs(run: Run) -> bool:
    try:
        run()
    except Exception:  # a peer that cannot do this case does not count
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", help="only these; all that have a table by default")
    parser.add_argument("--minutes", type=float, default=10, help="for each operation, 10 by default")
    parser.add_argument("--output", type=Path, default=table.FOLDER, help="folder; kernels/tables by default")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("Tuning needs a CUDA GPU; PyTorch sees none.", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    cases, failed = collect("cuda")
    for op, why in failed.items():
        print(f"{op} gave no cases: {why}")
    status = int(bool(failed))
    for op in args.ops or sorted(path.stem for path in table.FOLDER.glob("*.json")):
        try:
            own = [case for case in cases if case.op == op]
            tune(op, own, 10 * major + minor, 60 * args.minutes, args.output)
        except Exception as error:  # the other operations can still be tuned
            print(f"{op}: not tuned: {explain(error)}")
            status = 1
        torch.cuda.empty_cache()
    return status


if __name__ == "__main__":
    sys.exit(main())
