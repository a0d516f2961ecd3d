"""Writes what was measured: results.csv, results.md and plots made from the CSV.

python benchmarks/report.py FOLDER          the table and the plots again, from FOLDER/results.csv
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import OUT_OF_TIME, Ceiling, Row

PACKAGES = ("torch", "triton", "numpy", "transformers", "flash-attn", "xformers", "apex", "deepspeed")


def environment(device: str, ceiling: Ceiling | None = None) -> dict[str, str]:
    """What the figures depend on: GPU, versions, commit; and the ceilings of the run."""
    found = {"gpu": torch.cuda.get_device_name() if device == "cuda" else "none (CPU)"}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    found["cuda"] = torch.version.cuda or "none"
    found["commit"] = commit()
    if ceiling:
        found |= {"ceiling_tflops": f"{ceiling.tflops:.4g}", "ceiling_gbps": f"{ceiling.gbps:.4g}"}
    return found


def commit() -> str:
    """Of this checkout; of a copy without its history, what BLIPFAST_COMMIT says."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        found = ""
    return found or os.environ.get("BLIPFAST_COMMIT", "unknown")


def write_csv(folder: Path, rows: Iterable[Row], about: dict[str, str]) -> None:
    """results.csv: the fields of `Row`, then the environment, the same in every line."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in fields(Row)]
    with (folder / "results.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow([*names, *about])
        for row in rows:
            out.writerow([*(_plain(value) for value in asdict(row).values()), *about.values()])


def read_csv(folder: Path) -> tuple[list[Row], dict[str, str]]:
    """The inverse of `write_csv`."""
    kinds = {field.name: field.type for field in fields(Row)}
    with (folder / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = [Row(**{name: _parsed(kind, line[name]) for name, kind in kinds.items()}) for line in lines]
    return rows, {name: value for name, value in (lines[0] if lines else {}).items() if name not in kinds}


def write_markdown(folder: Path, rows: list[Row], about: dict[str, str], remarks: Iterable[str] = ()) -> None:
    """results.md: a table an operation, what failed, and the environment."""
    lines = [
        f"# blipfast on {about['gpu']}",
        "",
        *(f"- {remark}" for remark in remarks),
        *_verdicts(rows),
        "",
    ]
    lines.append(
        "Times are medians (20 % to 80 %) in ms. Columns after it: our TFLOP/s and GB/s, the share of our time that"
    )
    lines.append(
        "the ceiling of this run asks for, our peak memory in MiB; then, for each other contender, its time over"
    )
    lines.append(
        "ours (above 1 ours is faster) and its peak memory over ours; last, what we want of ours, and the verdict."
    )
    for op in dict.fromkeys(row.op for row in rows if row.ms_p50):
        own = [row for row in rows if row.op == op]
        lines += ["", f"## {op}", "", *_table(own)]
        lines += [f"\n{remark}" for remark in dict.fromkeys(row.remark for row in own) if remark]
    if silent := [row for row in rows if row.note and row.note != OUT_OF_TIME]:
        lines += ["", "## Without a figure", ""]
        lines += [f"- {row.op} {row.shape} {row.mode}, {row.contender}: {row.note}" for row in silent]
    lines += ["", "## Environment", "", "```json", json.dumps(about, indent=1), "```", ""]
    (folder / "results.md").write_text("\n".join(lines))


def plot(folder: Path, rows: list[Row]) -> None:
    """speed.png: every contender's time over ours, by case. ceiling.png: ours against what the GPU could do."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = _by_case([row for row in rows if row.ratio_p50])
    if not cases:
        return
    peers = sorted({label for case in cases.values() for label in case if label != _ours(case).contender})
    height = 1.5 + 0.28 * len(cases)
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    colours = plt.get_cmap("tab20").colors
    for i, peer in enumerate(peers):
        points = [
            (case[peer], y)
            for y, case in enumerate(cases.values())
            if case.get(peer) not in (None, _ours(case))
        ]
        x = [row.ratio_p50 for row, _ in points]
        spans = [
            [r.ratio_p50 - r.ratio_p20 for r, _ in points],
            [r.ratio_p80 - r.ratio_p50 for r, _ in points],
        ]
        places = [y + 0.6 * ((i + 0.5) / len(peers) - 0.5) for _, y in points]
        look = {"fmt": "o^s"[i % 3], "markersize": 4, "color": colours[i % 20], "label": peer}
        axes.errorbar(x, places, xerr=spans, **look)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.set(xscale="log", xlabel="its time over ours: right of 1, ours is faster", yticks=range(len(cases)))
    axes.set_yticklabels([" ".join(key) for key in cases], fontsize=7)
    axes.invert_yaxis()
    if peers:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(folder / "speed.png", dpi=130)
    plt.close(figure)

    cases = {key: case for key, case in cases.items() if _ours(case).ceiling}
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.28 * len(cases)), layout="constrained")
    axes.barh(range(len(cases)), [100 * _ours(case).ceiling for case in cases.values()])
    axes.set(xlabel="% of the ceiling measured in the same run", yticks=range(len(cases)), xlim=(0, 100))
    axes.set_yticklabels([" ".join(key) for key in cases], fontsize=7)
    axes.invert_yaxis()
    figure.savefig(folder / "ceiling.png", dpi=130)
    plt.close(figure)


def _verdicts(rows: list[Row]) -> Iterable[str]:
    """One line for all targets, counted."""
    ends = [target.rpartition(": ")[2] for row in rows for target in row.targets.split("; ") if target]
    kinds = [end.rpartition(", ")[2] for end in ends]
    if kinds:
        yield "- Targets: " + ", ".join(
            f"{kinds.count(kind)} {kind}" for kind in ("met", "not met", "not measured")
        )


def _table(rows: list[Row]) -> Iterable[str]:
    cases = _by_case([row for row in rows if row.ms_p50])
    ours = {key: _ours(case) for key, case in cases.items()}
    labels = dict.fromkeys(label for case in cases.values() for label in case)
    peers = [label for label in labels if any(ours[key].contender != label for key in cases)]
    rated, wanted = (any(getattr(row, name) for row in ours.values()) for name in ("per_second", "targets"))
    heads = ["case", "dtype", "ours", "ms", "TFLOP/s", "GB/s", "ceiling", "MiB", *["a second"] * rated]
    heads += [*peers, *["targets"] * wanted]
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for key, case in cases.items():
        own = ours[key]
        cells = [f"{own.shape} {own.mode}", own.dtype, own.contender, _range(own, "ms")]
        shown = [(own.tflops, ".3g"), (own.gbps, ".4g"), (own.ceiling, ".0%"), (own.peak_mib, ".0f")]
        shown += [(own.per_second, ".4g")] * rated
        cells += [format(value, form) if value else "" for value, form in shown]
        for peer in peers:
            other = case.get(peer)
            cells.append("" if other in (None, own) else _range(other, "ratio") + _memory(other, own))
        cells += [own.targets] * wanted
        yield "| " + " | ".join(cells) + " |"


def _by_case(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.op, row.shape, row.mode), {})[row.contender] = row
    return {key: case for key, case in cases.items() if any(label.startswith("ours") for label in case)}


def _ours(case: dict[str, Row]) -> Row:
    """The fastest of ours, with whom the others are compared; whoever has no time comes last."""
    return min(
        (row for label, row in case.items() if label.startswith("ours")),
        key=lambda row: row.ms_p50 or float("inf"),
    )


def _range(row: Row, name: str) -> str:
    low, middle, high = (getattr(row, f"{name}_{q}") for q in ("p20", "p50", "p80"))
    return f"{'**x' if name == 'ratio' else ''}{middle:.3g}{'**' if name == 'ratio' else ''} ({low:.3g} to {high:.3g})"


def _memory(other: Row, own: Row) -> str:
    return (
        f", memory x{other.peak_mib / own.peak_mib:.2g}"
        if own.peak_mib and other.peak_mib is not None
        else ""
    )


def _plain(value: object) -> object:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else value


def _parsed(kind: str, text: str) -> object:
    if kind == "str":
        return text
    return int(text) if kind == "int" else float(text) if text else None


if __name__ == "__main__":
    where = Path(sys.argv[1])
    measured, what = read_csv(where)
    write_markdown(where, measured, what)
    plot(where, measured)
