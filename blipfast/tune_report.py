"""What a hyperparameter search found, as a picture and a page."""

from __future__ import annotations

import base64
import io
import json
import warnings
from html import escape
from pathlib import Path
from typing import Any

from blipfast.files import whole

INK, SOFT, LINE, BEST = "#1f2430", "#8a8f99", "#2563a8", "#c2410c"
COLUMNS = 3
ENOUGH = 10  # complete trials before importances are estimated
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2430; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
img { max-width: 100% } table { border-collapse: collapse; width: 100% }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #e3e6ea } tr.best { background: #fff3e6 }
"""


def write_report(study: Any, folder: Path, metric: str) -> None:
    """Write folder/study.html, and folder/study.png where matplotlib is installed; both whole or not at all."""
    trials = [
        t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and "settings" in t.user_attrs
    ]
    picture = _draw(study, trials, metric)
    for name, content in (("study.png", picture), ("study.html", _page(trials, metric, picture).encode())):
        if content:
            with whole(folder / name) as unfinished:
                unfinished.write_bytes(content)


def importances(study: Any) -> dict[str, float]:
    """How much each setting mattered, from 0 to 1 (PED-ANOVA); empty while there are too few trials to say."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    if sum(trial.state.name == "COMPLETE" for trial in study.get_trials(deepcopy=False)) < ENOUGH:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls the estimator experimental
        return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())


def _draw(study: Any, trials: list[Any], metric: str) -> bytes:
    """The figure as PNG; empty without matplotlib or without a trial that has a value."""
    valued = [trial for trial in trials if trial.value is not None]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("note: no picture of the search: it needs matplotlib: pip install 'blipfast[plot]'")
        return b""
    if not valued:
        return b""
    names = list(valued[0].params)
    rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(11, 3.2 * (rows + 1)), layout="constrained")
    grid = figure.add_gridspec(rows + 1, COLUMNS)
    _history(figure.add_subplot(grid[0, : COLUMNS - 1]), valued, metric)
    _bars(figure.add_subplot(grid[0, COLUMNS - 1]), importances(study))
    for place, name in enumerate(names):
        _slice(figure.add_subplot(grid[1 + place // COLUMNS, place % COLUMNS]), valued, name, metric)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=SOFT, labelsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    return buffer.getvalue()


def _history(axes: Any, trials: list[Any], metric: str) -> None:
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    pruned = [trial for trial in trials if trial.state.name == "PRUNED"]
    axes.scatter([t.number for t in complete], [t.value for t in complete], s=22, color=LINE, label="trial")
    axes.scatter(
        [t.number for t in pruned], [t.value for t in pruned], s=22, marker="x", color=SOFT, label="pruned"
    )
    best = [max(t.value for t in complete[: place + 1]) for place in range(len(complete))]
    axes.step([t.number for t in complete], best, where="post", color=BEST, label="best so far")
    axes.set_title(f"{metric} of each trial", color=INK, fontsize=10, loc="left")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8)


def _bars(axes: Any, importance: dict[str, float]) -> None:
    names = list(reversed(importance))
    axes.barh(names, [importance[name] for name in names], color=LINE, height=0.6)
    title = "what mattered (PED-ANOVA)" if names else f"what mattered: after {ENOUGH} whole trials"
    axes.set_title(title, color=INK, fontsize=10, loc="left")
    axes.set_xlim(0, 1)
    axes.yaxis.set_visible(bool(names))


def _slice(axes: Any, trials: list[Any], name: str, metric: str) -> None:
    """The metric over one setting; later trials are darker."""
    found = [json.loads(trial.user_attrs["settings"][name]) for trial in trials]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in found)
    axes.scatter(
        found if numbers else [json.dumps(value) for value in found],
        [trial.value for trial in trials],
        c=[trial.number for trial in trials],
        cmap="Blues",
        edgecolors=SOFT,
        linewidths=0.5,
        s=26,
    )
    if numbers and getattr(trials[0].distributions[name], "log", False):
        axes.set_xscale("log")
    axes.set_title(name, color=INK, fontsize=10, loc="left")
    axes.set_ylabel(metric, color=SOFT, fontsize=8)


def _page(trials: list[Any], metric: str, picture: bytes) -> str:
    names = list(trials[0].params) if trials else []
    best = max((t.value for t in trials if t.state.name == "COMPLETE"), default=None)
    head = "".join(f"<th>{escape(name)}</th>" for name in ("trial", metric, "state", *names))
    rows = ""
    for trial in sorted(trials, key=lambda t: (t.value is None, -(t.value or 0))):
        value = "" if trial.value is None else f"{trial.value:.4g}"
        chosen = [_short(json.loads(trial.user_attrs["settings"].get(name, "null"))) for name in names]
        cells = (trial.user_attrs["folder"], value, trial.state.name.lower(), *chosen)
        mark = " class=best" if trial.state.name == "COMPLETE" and trial.value == best else ""
        rows += f"<tr{mark}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>\n"
    image = (
        f'<img alt="" src="data:image/png;base64,{base64.b64encode(picture).decode()}">' if picture else ""
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Search for {escape(metric)}</title>'
        f"<style>{_STYLE}</style><h1>Search for {escape(metric)}: {len(trials)} trials</h1>{image}"
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></html>\n"
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
