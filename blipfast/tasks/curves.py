"""curves.png: how a run went, drawn from its log.jsonl as small multiples."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from blipfast.files import whole

PANELS = {  # keys of log.jsonl, and what to call them
    "loss": "loss",
    "loss_itc": "image-text contrast (ITC)",
    "loss_itm": "image-text matching (ITM)",
    "loss_lm": "captioning (LM)",
    "loss_mlm": "masked words (MLM)",
    "itm_accuracy": "ITM accuracy",
    "alpha": "alpha, weight of the momentum targets",
    "temperature": "temperature",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "samples_per_second": "samples a second",
}
ITM_PRIOR = 2 / 3  # one pair in three is true
COLUMNS = 3
INK, SOFT, LINE = "#1f2430", "#8a8f99", "#2563a8"


def plot_curves(log: str | os.PathLike, png: str | os.PathLike) -> Path | None:
    """Draw what log.jsonl holds (training records, and evaluations if there are several) and return the picture's path.

    Keys that no record has get no panel; lines that are not JSON and values that are not finite are passed over. A
    picture must never end a training run: without matplotlib, without records or with a disk that refuses, one line
    says so and None is returned.
    """
    training, evaluations = read_curves(log)
    panels = [key for key in PANELS if key in training]
    if not panels:
        print(f"note: no curves drawn: {log} has no training records")
        return None
    try:
        return _draw(panels, training, evaluations, Path(png))
    except ImportError:
        print("note: no curves drawn: they need matplotlib: pip install 'blipfast[plot]'")
    except OSError as error:
        print(f"note: no curves drawn: {png} cannot be written ({error})")
    return None


def read_curves(
    log: str | os.PathLike,
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, list[tuple[float, float]]]]:
    """(step, value) points by key: of the training records, and of the evaluations. Both empty without a file."""
    training: dict[str, list[tuple[float, float]]] = {}
    evaluations: dict[str, list[tuple[float, float]]] = {}
    path = Path(log)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        record = _parse(line)
        step = record.get("step")
        if not _finite(step) or record.get("event", "evaluate") != "evaluate":
            continue
        curves = evaluations if "event" in record else training
        for key, value in record.items():
            if _finite(value):
                curves.setdefault(key, []).append((step, value))
    return training, evaluations


def _parse(line: str) -> dict[str, Any]:
    """A record; empty for a line cut short by a kill."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return record if isinstance(record, dict) else {}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _draw(panels: list[str], training: dict, evaluations: dict, png: Path) -> Path:
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,
    )  # draws to memory: needs no display, leaves pyplot alone
    from matplotlib.figure import Figure

    recall = {
        name: evaluations[key]
        for key, name in (("txt_r1", "picture to text"), ("img_r1", "text to picture"))
        if len(evaluations.get(key, ())) > 1
    }
    count = len(panels) + bool(recall)
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(
        figsize=(4.2 * columns, 2.5 * rows + 0.2), dpi=110, layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    last = max(step for points in training.values() for step, _ in points)
    for axes in all_axes:
        axes.set_visible(False)
    for key, axes in zip(panels, all_axes):
        _panel(axes, PANELS[key], last)
        _curve(axes, key, training[key])
    if recall:
        axes = all_axes[len(panels)]
        _panel(axes, "recall@1 on the test set, %", last)
        for (name, points), colour in zip(recall.items(), (LINE, "#c2571a")):
            axes.plot(*zip(*points), color=colour, linewidth=1.8, marker="o", markersize=3, label=name)
        axes.legend(frameon=False, fontsize=8)
    with whole(png) as unfinished:
        figure.savefig(unfinished, format="png")
    return png


def _panel(axes: Any, title: str, last: float) -> None:
    axes.set_visible(True)
    axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c9ccd2")
    axes.tick_params(colors=SOFT, labelsize=8, length=3)
    axes.grid(axis="y", color="#eceef1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(0, max(last, 1))
    axes.set_xlabel("step", fontsize=8, color=SOFT, loc="right", labelpad=0)


def _curve(axes: Any, key: str, points: list[tuple[float, float]]) -> None:
    steps, values = zip(*points)
    smooth = _smooth(values) if key not in ("alpha", "lr", "temperature") else list(values)
    axes.plot(steps, values, color=LINE, linewidth=1.0, alpha=0.28)
    axes.plot(
        steps, smooth, color=LINE, linewidth=1.8, marker="o" if len(values) == 1 else None, markersize=4
    )
    axes.annotate(
        f"{smooth[-1]:.3g}",
        (steps[-1], smooth[-1]),
        (0, 6),
        textcoords="offset points",
        ha="right",
        fontsize=8.5,
        color=INK,
    )
    axes.margins(y=0.15)
    if key == "itm_accuracy":
        axes.axhline(ITM_PRIOR, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "prior",
            (0.99, ITM_PRIOR),
            xycoords=("axes fraction", "data"),
            fontsize=8,
            color=SOFT,
            va="bottom",
            ha="right",
        )
    if key in ("lr", "alpha", "samples_per_second"):
        axes.set_ylim(bottom=0)
    if key == "lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.yaxis.get_offset_text().set(size=8, color=SOFT)


def _smooth(values: tuple[float, ...]) -> list[float]:
    """A running mean over about a fiftieth of the curve, unbiased at its start."""
    keep = 1 - min(1.0, 50 / len(values))
    mean = weight = 0.0
    smoothed = []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed
