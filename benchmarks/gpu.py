"""Everything a GPU machine can tell about the kernels and the models, in one call of at most eight minutes.

    python benchmarks/gpu.py [--output FOLDER] [--budget SECONDS] [--ops NAME ...] [--modes full] [--skip-tests]
    python benchmarks/gpu.py --dry-run --output FOLDER          on a CPU: the smallest case of each, the PyTorch paths

Needs this repository, torch, Triton, numpy, transformers and matplotlib; pytest for the tests; compares with
flash-attn, xformers, apex and DeepSpeed where they are installed. In turn: the GPU tests, compiling in several
processes, the ceilings (a large product, a large copy), then the cases of benchmarks/models and benchmarks/ops until
they or the time are used up: shapes with a target first, and of those the ones of which benchmarks/results has no
figure. Writes results.csv as it goes, then results.md, plots and tests.log, all to --output or to
benchmarks/results/<gpu name>/<commit>/; where there is no git, BLIPFAST_COMMIT says which commit it is. A case that
fails is reported and does not stop the others. Exits 1 if a test failed, or if one of our own paths gave no figure
though there was time.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import report  # noqa: E402
from benchmarks.cases import MODES  # noqa: E402
from benchmarks.measure import OUT_OF_TIME, Ceiling, Row  # noqa: E402
from benchmarks.worker import MARGIN, Lost, Title, Worker  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    device = "cpu" if args.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("No CUDA GPU is visible to PyTorch. Without one: --dry-run --output FOLDER", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    place = Path(re.sub(r"[^A-Za-z0-9._-]+", "_", name), report.commit())
    folder = args.output or RESULTS / place
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # in each of several processes
    run = Run(device, folder, start + args.budget, args.ops, args.modes, args.seconds)
    tests = "GPU tests: not run"
    if not args.dry_run and not args.skip_tests:
        tests = gpu_tests(folder / "tests.log", 0.4 * args.budget)
    print(tests, flush=True)
    if device == "cuda":
        run.wait_for(run.start_warmers(), time.monotonic() + 0.2 * args.budget)
    rows, remarks = run.measure_all()
    remarks = [tests, *remarks, f"The whole run took {time.monotonic() - start:.0f} s."]
    report.write_markdown(folder, rows, run.about, remarks)
    try:
        report.plot(folder, rows)
    except Exception as error:  # figures without a plot are better than none
        print(f"No plots: {error}")
    print((folder / "results.md").read_text())
    print(f"Written to {folder}")
    ours = [row for row in rows if row.note and row.note != OUT_OF_TIME and row.contender.startswith("our")]
    return int("failed" in tests or bool(ours) or bool(run.failed))


class Run:
    """The cases, in the order of their worth, and the process that measures them."""

    def __init__(
        self,
        device: str,
        folder: Path,
        deadline: float,
        ops: Sequence[str] | None,
        modes: Sequence[str],
        seconds: float,
    ) -> None:
        self.device, self.folder, self.deadline, self.seconds = device, folder, deadline, seconds
        self.worker = twice(lambda: Worker(device))
        self.failed = self.worker.failed
        self.titles: list[Title] = self.worker.titles
        wanted = [i for i, t in enumerate(self.titles) if (not ops or t.op in ops) and t.mode in modes]
        self.order = in_order(self.titles, wanted, known())
        if device == "cpu":  # a dry run: the first case of each operation, in each mode
            first = {(self.titles[i].op, self.titles[i].mode): i for i in reversed(self.order)}
            self.order = [i for i in self.order if i in first.values()]
        self.about = report.environment(device)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def start_warmers(self) -> list[Worker]:
        """Processes that compile what will be measured, which fills the caches on disk; none if they do not start."""
        memory = torch.cuda.get_device_properties(0).total_memory
        count = max(1, min(10, (os.cpu_count() or 2) // 2, int(memory / 12e9)))
        try:
            with ThreadPoolExecutor(count) as pool:  # each takes seconds to import what it needs
                warmers = list(pool.map(lambda _: Worker(self.device), range(count)))
        except Lost as lost:
            print(f"nothing is compiled ahead: {lost}", flush=True)
            return []
        for i, warmer in enumerate(warmers):
            warmer.tell("warm", self.order[i::count])
        return warmers

    def wait_for(self, warmers: list[Worker], until: float) -> None:
        """Let them finish, but no longer than `until`; then they are gone."""
        for warmer in warmers:
            try:
                warmer.answer(max(0.0, until - time.monotonic()))
            except Lost as lost:
                print(f"compiling ahead stopped: {lost}", flush=True)
            warmer.close()

    def measure_all(self) -> tuple[list[Row], list[str]]:
        """A row for every contender of every case, and remarks for the head of the report."""
        ceiling: Ceiling = twice(lambda: self.ask("ceiling", seconds=60))
        self.about = report.environment(self.device, ceiling)
        print(f"ceiling: {ceiling.tflops:.3g} TFLOP/s, {ceiling.gbps:.4g} GB/s", flush=True)
        rows: list[Row] = []
        for count, i in enumerate(self.order):
            rows += self.measure(self.titles[i], i, ceiling)
            report.write_csv(self.folder, rows, self.about)
            print(f"{count + 1}/{len(self.order)} {_line(rows, self.titles[i])}", flush=True)
        self.worker.close()
        missing = sum(row.note == OUT_OF_TIME for row in rows)
        remarks = [f"Ceiling: {ceiling.tflops:.4g} TFLOP/s (bf16 product), {ceiling.gbps:.4g} GB/s (copy)."]
        remarks += [f"{name} gave no cases: {why}" for name, why in self.failed.items()]
        remarks += (
            [f"{missing} of {len(self.order)} cases were not run, for lack of time."] if missing else []
        )
        return rows, remarks

    def measure(self, title: Title, index: int, ceiling: Ceiling) -> list[Row]:
        def nothing(why: str) -> list[Row]:
            return [
                Row(
                    title.op, title.shape, title.dtype.removeprefix("torch."), title.mode, "ours",
                    targets="; ".join(f"{target}: not measured" for target in title.targets), note=why,
                )
            ]  # fmt: skip

        if self.left() < 30:  # what it takes to end: a case, the report
            return nothing(OUT_OF_TIME)
        limit = min(title.seconds, self.left() - 5)
        try:
            return self.ask("measure", index, ceiling, self.seconds, limit - MARGIN, seconds=limit)
        except Lost as lost:
            return nothing(f"the case was given up: {lost}")

    def ask(self, verb: str, *arguments: object, seconds: float) -> Any:
        """Of the process that measures, or of a new one if it is gone. Raises Lost as `Worker.ask` does."""
        if not self.worker.process.is_alive():
            self.worker = Worker(self.device)
        return self.worker.ask(verb, *arguments, seconds=seconds)


def twice(attempt: Callable[[], Any]) -> Any:
    """What `attempt` gives; once more if a process is lost, for without it there is no run."""
    try:
        return attempt()
    except Lost as lost:
        print(f"once more: {lost}", flush=True)
        return attempt()


def known() -> set[tuple[str, str, str]]:
    """Operation, shape and mode of what of ours was measured before, on whichever GPU."""
    rows = []
    for path in RESULTS.glob("*/*/results.csv"):
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    return {
        (row["op"], row["shape"], row["mode"])
        for row in rows
        if row["contender"].startswith("ours") and row["ms_p50"]
    }


def in_order(titles: Sequence[Title], wanted: Sequence[int], known: set[tuple[str, str, str]]) -> list[int]:
    """Places in titles: by rank, then what is not known first, then one case of every operation after the other."""

    def worth(i: int) -> tuple[int, bool, int]:
        title = titles[i]
        return title.rank, (title.op, title.shape, title.mode) in known, title.place

    return sorted(wanted, key=worth)


def gpu_tests(log: Path, seconds: float) -> str:
    """Run the tests that need a GPU; one line on how they went. What they print goes to `log`."""
    if importlib.util.find_spec("pytest") is None:
        return "GPU tests: not run, pytest is not installed"
    files = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8:
        command += ["-n", str(min(8, os.cpu_count() // 2))]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"GPU tests: failed, not done after {seconds:.0f} s; see {log.name}"
    last = (log.read_text().strip().splitlines() or ["no output"])[-1].strip("= ")
    return f"GPU tests: {'passed' if code == 0 else 'failed'}, {last}"


def _line(rows: list[Row], title: Title) -> str:
    """What to print of the case that was measured last."""
    own = [row for row in rows if (row.op, row.shape, row.mode) == (title.op, title.shape, title.mode)]
    cells = [f"{r.contender} {r.ms_p50:.3g} ms" if r.ms_p50 else f"{r.contender}: {r.note}" for r in own]
    return f"{title.op} {title.shape} {title.mode}: " + ", ".join(cells)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, help="folder; benchmarks/results/<gpu name>/<commit> by default"
    )
    parser.add_argument("--budget", type=float, default=460, help="seconds in all, 460 by default")
    parser.add_argument("--seconds", type=float, default=0.4, help="of measuring a contender, 0.4 by default")
    parser.add_argument("--ops", nargs="+", help="only these operations")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="only these")
    parser.add_argument("--skip-tests", action="store_true", help="measure without testing first")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, to test this program")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
