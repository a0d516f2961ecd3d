"""gallery.html and curves.png."""

from __future__ import annotations

import builtins
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from blipfast.tasks.curves import plot_curves, read_curves
from blipfast.tasks.gallery import Caption, Gallery, Hit, ImageQuery, TextQuery, sample, write_gallery

EVIL = "<script>alert('x')</script> & \"dog\" $title"
RED = torch.zeros(3, 8, 8, dtype=torch.uint8)


def page(tmp_path, **parts) -> str:
    return write_gallery(tmp_path / "gallery.html", Gallery("A run", **parts)).read_text(encoding="utf-8")


def articles(html: str) -> list[str]:
    return re.findall(r'<article class="(\w+)">', html)


def test_texts_are_escaped_wherever_they_appear(tmp_path):
    hits = [Hit(EVIL, 1.0, False, RED)]
    html = page(
        tmp_path,
        metrics={EVIL: 1.0},
        text_to_image=[TextQuery(EVIL, hits, truth=RED)],
        image_to_text=[ImageQuery(RED, EVIL, hits)],
        captions=[Caption(RED, EVIL, EVIL)],
        note=EVIL,
    )
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 6


def test_page_stands_alone(tmp_path):
    html = page(tmp_path, captions=[Caption(RED, "a dog", "a dog")])
    assert re.findall(r'(?:src|href)="(?!data:)', html) == []
    assert "url(" not in html and "@import" not in html and "http" not in html


def test_right_and_wrong_answers_are_told_apart(tmp_path):
    right, wrong = Hit("dog", 2.0, True, RED), Hit("cat", 1.0, False, RED)
    html = page(
        tmp_path,
        text_to_image=[TextQuery("dog", [right, wrong]), TextQuery("dog", [wrong], rank=7, truth=RED)],
        image_to_text=[ImageQuery(RED, "dog", [wrong, right])],
        captions=[Caption(RED, "Womans Boot!", ["shoe", "womans boot"]), Caption(RED, "a cat", "a dog")],
    )
    assert articles(html) == ["right", "wrong", "wrong", "right", "wrong"]
    assert "rank 7" in html and "right 1" in html
    assert "<b class=same>a</b> <b class=other>cat</b>" in html


def test_figures_stand_beside_chance(tmp_path):
    metrics = {
        "txt_r1": 31.25,
        "img_r10": 67.7,
        "texts": 651,
        "images": 651,
        "itm_accuracy": 91.0,
        "itm_prior": 66.7,
    }
    html = page(tmp_path, metrics=metrics)
    assert (
        "31.2<span>" in html and "chance 0.15 %" in html and "chance 1.5 %" in html and "prior 66.7 %" in html
    )


@pytest.mark.parametrize(
    "picture",
    [
        torch.randint(0, 256, (4, 9, 12), dtype=torch.uint8),
        np.zeros((300, 500, 3), dtype=np.uint8),
        Image.new("P", (5, 5)),
        Image.new("LA", (5, 5)),
    ],
)
def test_pictures_of_many_kinds_are_shown(tmp_path, picture):
    html = page(tmp_path, captions=[Caption(picture, "x", "y")])
    assert html.count("data:image/webp;base64,") == 1


def test_a_picture_of_floats_is_refused(tmp_path):
    with pytest.raises(ValueError, match="float32"):
        page(tmp_path, captions=[Caption(torch.rand(3, 8, 8), "x", "y")])
    assert not (tmp_path / "gallery.html").exists()


def test_an_empty_gallery_is_a_page(tmp_path):
    assert "<section" not in page(tmp_path)


def test_sample_is_the_same_every_time_and_not_the_first_ones():
    assert sample(100, 10) == sample(100, 10) != list(range(10))
    assert sorted(sample(5, 10)) == [0, 1, 2, 3, 4]


def write_log(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_curves_are_drawn_from_what_a_log_has(tmp_path):
    pytest.importorskip("matplotlib")
    records = [{"step": s, "epoch": 0, "loss": 5 - s / 9, "itm_accuracy": 0.7, "lr": 1e-3} for s in range(9)]
    records += [{"event": "evaluate", "step": s, "txt_r1": 5.0 * s, "img_r1": 4.0 * s} for s in (4, 8)]
    log = tmp_path / "log.jsonl"
    write_log(log, records)
    with open(log, "a") as file:
        file.write('{"step": 9, "loss": NaN}\n[1]\n{"event": "complete", "step": 8}\n{"step": 10, "lo')
    png = plot_curves(log, tmp_path / "curves.png")
    with Image.open(png) as picture:
        assert picture.width > 600 and len(picture.convert("L").getcolors()) > 10
    training, evaluations = read_curves(log)
    assert [step for step, _ in training["loss"]] == list(range(9))
    assert training.keys() == {"step", "epoch", "loss", "itm_accuracy", "lr"}
    assert evaluations["txt_r1"] == [(4, 20.0), (8, 40.0)]


def test_one_record_of_one_figure_is_enough_for_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    assert plot_curves(write_log(tmp_path / "log", [{"step": 1, "loss": 3.0}]), tmp_path / "c.png").exists()


def test_a_run_goes_on_without_records_matplotlib_or_disk(tmp_path, monkeypatch, capsys):
    assert plot_curves(tmp_path / "missing.jsonl", tmp_path / "c.png") is None
    log = write_log(tmp_path / "log.jsonl", [{"step": 1, "loss": 3.0}])
    if pytest.importorskip("matplotlib"):
        assert plot_curves(log, tmp_path / "log.jsonl" / "c.png") is None
        assert "cannot be written" in capsys.readouterr().out

    imported = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert plot_curves(log, tmp_path / "c.png") is None
    assert "pip install 'blipfast[plot]'" in capsys.readouterr().out
