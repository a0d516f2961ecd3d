"""What every benchmark shares: contenders run in turn in one process, and a CSV row for each, with versions.

Run with `pytest benchmarks/ --benchmark-only`; results go to benchmarks/results/.
"""

from __future__ import annotations

import csv
import platform
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import quantiles

import pytest
import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "pillow", "simplejpeg", "numpy")


@pytest.fixture
def one_thread():
    """Figures are for one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def contest(benchmark, capsys):
    """Time contenders, alternating, and report each against the first: contest(name, {label: function}, per=items).

    Every round runs every contender once, so that a busy machine slows all of them alike. Prints items per second
    (median, 20 % and 80 % quantiles) and the ratio of each round's times to the first contender's; writes
    results/NAME.csv and, with matplotlib, NAME.png; returns {label: median ratio}.
    """

    def run(
        name: str, contenders: dict[str, Callable[[], object]], per: int, rounds: int = 40
    ) -> dict[str, float]:
        times: dict[str, list[float]] = {label: [] for label in contenders}

        def one_round() -> None:
            for label, contender in contenders.items():
                start = time.perf_counter()
                contender()
                times[label].append(time.perf_counter() - start)

        benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=2)
        times = {label: values[2:] for label, values in times.items()}  # without the warm-up
        base = times[next(iter(contenders))]
        rows, ratios = [], {}
        for label, own in times.items():
            rate = spread([per / t for t in own])
            ratios[label] = ratio = spread([b / t for b, t in zip(base, own, strict=True)])
            rows.append([name, label, *(f"{value:.4g}" for value in (*rate, *ratio)), *versions().values()])
            with capsys.disabled():
                print(f"\n  {label:32s} {rate[1]:7.0f}/s ({rate[0]:.0f} to {rate[2]:.0f})", end="")
                print(f"   x{ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})", end="")
        rate_names = [f"{kind}_{q}" for kind in ("per_second", "ratio") for q in ("p20", "p50", "p80")]
        write(name, ["benchmark", "contender", *rate_names, *versions()], rows)
        plot(name, ratios)
        medians = {label: ratio[1] for label, ratio in ratios.items()}
        benchmark.extra_info.update({f"ratio {label}": round(ratio, 2) for label, ratio in medians.items()})
        return medians

    return run


def spread(values: list[float]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % quantiles."""
    tenths = quantiles(values, n=10)
    return tenths[1], tenths[4], tenths[7]


def versions() -> dict[str, str]:
    """Versions of what the figures depend on, and the commit ("" outside a git repository)."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    command = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    return found | {
        "python": platform.python_version(),
        "commit": commit.stdout.strip() if not commit.returncode else "",
    }


def write(name: str, header: list[str], rows: list[list[str]]) -> None:
    """Write results/NAME.csv."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def plot(name: str, ratios: dict[str, tuple[float, float, float]]) -> None:
    """results/NAME.png: how many times as fast as the first contender each is, with quantiles."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    low, middle, high = zip(*ratios.values())
    errors = [[m - x for m, x in zip(middle, low)], [x - m for m, x in zip(middle, high)]]
    figure, axes = pyplot.subplots(figsize=(6, 0.6 + 0.4 * len(ratios)), layout="constrained")
    axes.barh(list(ratios), middle, xerr=errors, color="tab:blue", ecolor="black", capsize=3)
    axes.invert_yaxis()
    axes.set(xlabel=f"times as fast as {next(iter(ratios))}", title=name)
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    pyplot.close(figure)


def forget_peak() -> None:
    """Let `resident("VmHWM")` begin from now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> float:
    """MiB of this process that Linux calls VmRSS (now) or VmHWM (at most, since `forget_peak`).

    getrusage would begin from the peak of the process that started this one, which may be gigabytes.
    """
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024
