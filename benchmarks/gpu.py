"""Everything a GPU machine can tell about the kernels and the models, in one call of at most eight minutes.

    python benchmarks/gpu.py [--output FOLDER] [--budget SECONDS] [--ops NAME ...] [--skip-tests]
    python benchmarks/gpu.py --dry-run --output FOLDER          on a CPU: the smallest case of each, the PyTorch paths

Needs this repository, torch, Triton, numpy, transformers and matplotlib; pytest for the tests; compares with
flash-attn, xformers, apex and DeepSpeed where they are installed. In turn: the GPU tests (meanwhile other processes
compile what will be measured), the ceilings (a large product, a large copy), then the cases of benchmarks/models and
benchmarks/ops, those with a target first, until they or the time are used up. Writes results.csv as it goes, then
results.md, plots and tests.log to benchmarks/results/<gpu name>/<commit>/. A case that fails is reported and does not
stop the others. Exits 1 if a test failed, or if one of our own paths gave no figure though there was time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import report  # noqa: E402
from benchmarks.measure import OUT_OF_TIME, Ceiling, Row  # noqa: E402
from benchmarks.worker import Lost, Title, Worker  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    device = "cpu" if args.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("No CUDA GPU is visible to PyTorch. Without one: --dry-run --output FOLDER", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    place = Path(re.sub(r"[^A-Za-z0-9._-]+", "_", name), report.commit())
    folder = args.output or ROOT / "benchmarks" / "results" / place
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # in each of several processes
    run = Run(device, folder, start + args.budget, args.ops, args.seconds)
    if args.dry_run or args.skip_tests:
        tests = "GPU tests: not run"
    else:
        warmers = run.start_warmers()
        tests = gpu_tests(folder / "tests.log", 0.4 * args.budget)
        run.wait_for(warmers, start + 0.25 * args.budget)
    print(tests, flush=True)
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
        self, device: str, folder: Path, deadline: float, ops: list[str] | None, seconds: float
    ) -> None:
        self.device, self.folder, self.deadline, self.seconds = device, folder, deadline, seconds
        self.worker = Worker(device)
        self.failed = self.worker.failed
        self.titles: list[Title] = self.worker.titles
        numbers = [i for i, title in enumerate(self.titles) if not ops or title.op in ops]
        self.order = sorted(numbers, key=lambda i: (self.titles[i].rank, self.titles[i].place))
        if device == "cpu":  # a dry run: the first case of each operation, in each mode
            first = {(self.titles[i].op, self.titles[i].mode): i for i in reversed(self.order)}
            self.order = [i for i in self.order if i in first.values()]
        self.about = report.environment(device)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def start_warmers(self) -> list[Worker]:
        """Processes that compile what will be measured, which fills the caches on disk."""
        memory = torch.cuda.get_device_properties(0).total_memory
        count = max(1, min(10, (os.cpu_count() or 2) // 2, int(memory / 12e9)))
        with ThreadPoolExecutor(count) as pool:  # each takes seconds to import what it needs
            warmers = list(pool.map(lambda _: Worker(self.device), range(count)))
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
        ceiling: Ceiling = self.worker.ask("ceiling", seconds=60)
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

        if self.left() < 15:  # what it takes to end: a case, the report
            return nothing(OUT_OF_TIME)
        try:
            if not self.worker.process.is_alive():
                self.worker = Worker(self.device)
            limit = min(title.seconds, self.left() - 5)
            return self.worker.ask("measure", index, ceiling, self.seconds, seconds=limit)
        except Lost as lost:
            return nothing(f"the case was given up: {lost}")


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
    parser.add_argument("--skip-tests", action="store_true", help="measure without testing first")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, to test this program")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
