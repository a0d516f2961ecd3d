"""gallery.html, what a person looks at after a run: what the model found and wrote.

One file: pictures are inside it, nothing is fetched, no script runs; light and dark follow the reader.
"""

from __future__ import annotations

import base64
import io
import os
import re
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from PIL import Image

from blipfast.data.views import RetrievalView
from blipfast.files import whole
from blipfast.metrics import ranks

from .scoring import Scores

Picture = torch.Tensor | np.ndarray | Image.Image | str | os.PathLike
TEMPLATE = Path(__file__).resolve().parent.parent / "assets" / "gallery.html"
THUMBNAIL = 192  # pixels; larger pictures are shown at this size
HITS = 5  # shown for each query
SAME_WORDS = re.compile(r"\w+|\W+")


@dataclass
class Hit:
    """One answer of a retrieval. `image` for a hit that is a picture; `correct` if it is what was asked for."""

    label: str
    score: float
    correct: bool
    image: Picture | None = None


@dataclass
class TextQuery:
    """A text and the pictures it found, best first. `rank` (from 1) and `truth` (the right picture), if known, are
    shown where none of the hits is right."""

    query: str
    hits: list[Hit]
    rank: int = 0
    truth: Picture | None = None


@dataclass
class ImageQuery:
    """A picture and the texts it found, best first; `truth` is its own text, `rank` (from 1) where that one stands."""

    image: Picture
    truth: str
    hits: list[Hit]
    rank: int = 0


@dataclass
class Caption:
    """A picture, what the model wrote about it, and what people did (one text or several)."""

    image: Picture
    caption: str
    truth: str | list[str]


@dataclass
class Gallery:
    """Everything gallery.html shows. `metrics` are figures by name, recall in per cent under the official names
    (`txt_r1`: the right text for a picture, `img_r1`: the right picture for a text). The lists should be a random
    sample of the test set, right and wrong as they come: the page says they are."""

    title: str
    metrics: dict[str, float] = field(default_factory=dict)
    text_to_image: list[TextQuery] = field(default_factory=list)
    image_to_text: list[ImageQuery] = field(default_factory=list)
    captions: list[Caption] = field(default_factory=list)
    note: str = ""


def write_gallery(path: str | os.PathLike, gallery: Gallery) -> Path:
    """Write the page and return its path; an older page is replaced once the new one is whole.

    Pictures: uint8 tensor [C, H, W] or array [H, W, C] with 3 or 4 channels, a Pillow image, or a file's path.
    Raises ValueError for a picture of another kind.
    """
    pictures = _Pictures()
    sections = [
        _section(
            "text-to-image",
            "Text → picture",
            "Each text was asked for; these pictures scored highest.",
            [_text_query(query, pictures) for query in gallery.text_to_image],
        ),
        _section(
            "image-to-text",
            "Picture → text",
            "Each picture was shown; these texts scored highest.",
            [_image_query(query, pictures) for query in gallery.image_to_text],
        ),
        _section(
            "captions",
            "Captions",
            "What the model wrote, word for word; words that are in the truth are green.",
            [_caption(caption, pictures) for caption in gallery.captions],
        ),
    ]
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(gallery.title),
        note=f"<p class=note>{escape(gallery.note)}</p>" if gallery.note else "",
        tiles=_tiles(gallery.metrics),
        figures=_figures(gallery.metrics),
        sections="\n".join(sections),
    )
    with whole(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return Path(path)


def sample(count: int, wanted: int, seed: int = 0) -> list[int]:
    """`wanted` of the numbers 0 .. count-1 (all, if there are fewer), drawn without looking and always the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:wanted].tolist()


def gallery(
    count: int,
    test: RetrievalView,
    scores: Scores,
    captions: list[str],
    truths: list[list[str]],
    metrics: dict[str, float],
) -> Gallery:
    """What retrieval found: a fixed random sample of `count` pictures and of as many texts, as they come.

    captions: what was written about each picture; [] if nothing was.
    """
    img2txt = [test.img2txt[i] for i in range(len(test))]
    txt2img = [
        [found] if isinstance(found, int) else list(found)
        for found in map(test.txt2img.get, range(len(test.text)))
    ]
    image_ranks, text_ranks = ranks(scores.i2t, img2txt), ranks(scores.t2i, txt2img)

    def hits(row: torch.Tensor, truth: list[int], pictures: bool) -> list[Hit]:
        best = row.topk(min(HITS, len(row)))
        return [
            Hit(
                truths[i][0] if pictures else test.text[i],
                score,
                i in truth,
                test[i][0] if pictures else None,
            )
            for score, i in zip(best.values.tolist(), best.indices.tolist())
        ]

    chosen = sample(len(test), count)
    return Gallery(
        "blipfast on pictures it has never seen",
        metrics,
        text_to_image=[
            TextQuery(
                test.text[t],
                hits(scores.t2i[t], txt2img[t], pictures=True),
                int(text_ranks[t]) + 1,
                test[txt2img[t][0]][0],
            )
            for t in sample(len(test.text), count, seed=1)
        ],
        image_to_text=[
            ImageQuery(
                test[i][0], truths[i][0], hits(scores.i2t[i], img2txt[i], False), int(image_ranks[i]) + 1
            )
            for i in chosen
        ],
        captions=[Caption(test[i][0], captions[i], truths[i]) for i in chosen if captions],
    )


class _Pictures:
    """Turns pictures into data URIs; a picture that is met again by identity is not encoded again."""

    def __init__(self):
        self.known: dict[int, tuple[Any, str]] = {}  # holds the picture too, so that its id stays its own

    def tag(self, picture: Picture, alternative: str) -> str:
        if id(picture) not in self.known:
            self.known[id(picture)] = (picture, _data_uri(picture))
        return f'<img src="{self.known[id(picture)][1]}" alt="{escape(alternative)}" loading="lazy">'


def _data_uri(picture: Picture) -> str:
    image = _to_pillow(picture)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _to_pillow(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    if isinstance(picture, str | os.PathLike):
        with Image.open(picture) as opened:
            return _to_pillow(opened)
    if isinstance(picture, torch.Tensor) and picture.ndim == 3:
        picture = picture.permute(1, 2, 0).cpu().numpy()
    if (
        isinstance(picture, np.ndarray)
        and picture.dtype == np.uint8
        and picture.ndim == 3
        and picture.shape[2] in (3, 4)
    ):
        return Image.fromarray(np.ascontiguousarray(picture))
    kind = f"{type(picture).__name__} {getattr(picture, 'dtype', '')} {tuple(getattr(picture, 'shape', ()))}"
    raise ValueError(
        f"the gallery cannot show {kind}; expected uint8 [3 or 4, H, W], a Pillow image or a path."
    )


def _section(name: str, title: str, what: str, cards: list[tuple[bool, str]]) -> str:
    """A section of cards, each told as (right, HTML), with a switch between all, the right and the wrong ones."""
    if not cards:
        return ""
    right = sum(card[0] for card in cards)
    counts = {"all": len(cards), "right": right, "wrong": len(cards) - right}
    switch = "".join(
        f'<label><input type=radio name="{name}" class=show-{which}{" checked" if which == "all" else ""}>'
        f"<span>{which} {count}</span></label>"
        for which, count in counts.items()
    )
    body = "\n".join(
        f'<article class="{"right" if good else "wrong"}">{html}</article>' for good, html in cards
    )
    return (
        f'<section id="{name}"><header><div><h2>{title}</h2><p>{what}</p></div>'
        f'<div class=switch role=group aria-label="show">{switch}</div></header><div class=cards>{body}</div></section>'
    )


def _text_query(query: TextQuery, pictures: _Pictures) -> tuple[bool, str]:
    hits = [
        f'<figure class="{"hit" if hit.correct else ""}">{pictures.tag(hit.image, hit.label)}'
        f"<figcaption>{escape(hit.label)}</figcaption><small>{hit.score:.2f}</small></figure>"
        for hit in query.hits
    ]
    if query.truth is not None and not any(hit.correct for hit in query.hits):
        place = f"rank {query.rank}" if query.rank else "not found"
        hits.append(
            f"<figure class=missed>{pictures.tag(query.truth, query.query)}"
            f"<figcaption>the truth</figcaption><small>{place}</small></figure>"
        )
    right = _first_is_right(query.hits)
    return right, f"<h3>{_mark(right)}{escape(query.query)}</h3><div class=strip>{''.join(hits)}</div>"


def _image_query(query: ImageQuery, pictures: _Pictures) -> tuple[bool, str]:
    rows = [
        f'<li class="{"hit" if hit.correct else ""}"><span>{escape(hit.label)}</span>'
        f"<small>{hit.score:.2f}</small></li>"
        for hit in query.hits
    ]
    if not any(hit.correct for hit in query.hits):
        place = f"rank {query.rank}" if query.rank else "not found"
        rows.append(f"<li class=missed><span>{escape(query.truth)}</span><small>{place}</small></li>")
    html = f"<div class=beside>{pictures.tag(query.image, query.truth)}<ol>{''.join(rows)}</ol></div>"
    return _first_is_right(query.hits), html


def _caption(caption: Caption, pictures: _Pictures) -> tuple[bool, str]:
    truths = [caption.truth] if isinstance(caption.truth, str) else list(caption.truth)
    exact = _plain(caption.caption) in {_plain(truth) for truth in truths}
    known = {word for truth in truths for word in _plain(truth).split()}
    words = [
        f"<b class={'same' if _plain(piece) in known else 'other'}>{escape(piece)}</b>"
        if piece[0].isalnum()
        else escape(piece)
        for piece in SAME_WORDS.findall(caption.caption)
    ]
    html = (
        f"<div class=beside>{pictures.tag(caption.image, truths[0] if truths else '')}<div>"
        f"<p class=written>{_mark(True) if exact else ''}{''.join(words) or '<i>nothing</i>'}</p>"
        f"<p class=truth>{escape(' / '.join(truths))}</p></div></div>"
    )
    return exact, html


def _plain(text: str) -> str:
    """Lower case, letters and digits: "Woman’s boot" and "woman s boot" are one text."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _first_is_right(hits: list[Hit]) -> bool:
    return bool(hits) and hits[0].correct


def _mark(right: bool) -> str:
    return "<i class=tick>✓</i>" if right else "<i class=cross>✗</i>"


def _tiles(metrics: dict[str, float]) -> str:
    """The figures a reader wants first, those of them that are there."""
    tiles = []
    for prefix, title, choices in (("img", "text → picture", "images"), ("txt", "picture → text", "texts")):
        for k in (1, 5, 10):
            if f"{prefix}_r{k}" in metrics:
                place = f"{title}: right at first" if k == 1 else f"{title}: among the first {k}"
                chance = f"chance {100 * k / metrics[choices]:.2g} %" if metrics.get(choices) else ""
                tiles.append(_tile(metrics[f"{prefix}_r{k}"], place, chance))
    if "itm_accuracy" in metrics:
        prior = f"prior {metrics['itm_prior']:.1f} %" if "itm_prior" in metrics else ""
        tiles.append(_tile(metrics["itm_accuracy"], "ITM: a true pair or not", prior))
    if "caption_exact" in metrics:
        tiles.append(_tile(metrics["caption_exact"], "captions exactly as the truth", ""))
    return "".join(tiles)


def _tile(value: float, title: str, below: str) -> str:
    return (
        f"<div class=tile><strong>{value:.1f}<span>%</span></strong>"
        f"<p>{escape(title)}</p><small>{escape(below)}</small></div>"
    )


def _figures(metrics: dict[str, float]) -> str:
    if not metrics:
        return ""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{value:,.4g}</td></tr>"
        if isinstance(value, int | float)
        else f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in metrics.items()
    )
    return f"<details><summary>All {len(metrics)} figures</summary><table>{rows}</table></details>"
