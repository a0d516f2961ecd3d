"""Statements about two pictures of easy-VQA, true or false, in NLVR2's format.

How they are made: a template and its words are drawn at random; then a pair of different pictures of which the
statement is true and a pair of which it is false. So every sentence is true as often as it is false, and whoever reads
it alone is right half of the time. With probability 1/2 a picture is drawn among those that have one of the words in
the sentence, so that false statements are often nearly true. Training, validation and test statements are about the
pictures of their own part only. Colours and shapes are those that easy-VQA's questions and answers tell.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

PAIRS = {"train": 20000, "val": 1000, "test": 2000}


class Template(NamedTuple):
    """A sentence with {colour}, {other}, {shape} or {side} in it, and when it is true.

    true(left, right, words): left and right are (colour, shape), words what the sentence was filled with.
    """

    sentence: str
    true: Callable[[tuple[str, str], tuple[str, str], dict[str, str]], bool]


def _on_side(left: tuple[str, str], right: tuple[str, str], words: dict[str, str]) -> tuple[str, str]:
    return left if words["side"] == "left" else right


TEMPLATES = (
    Template("the {side} picture shows a {shape}", lambda a, b, w: _on_side(a, b, w)[1] == w["shape"]),
    Template("the shape on the {side} is {colour}", lambda a, b, w: _on_side(a, b, w)[0] == w["colour"]),
    Template("both pictures show a {shape}", lambda a, b, w: a[1] == b[1] == w["shape"]),
    Template("both shapes are {colour}", lambda a, b, w: a[0] == b[0] == w["colour"]),
    Template("neither shape is {colour}", lambda a, b, w: w["colour"] not in (a[0], b[0])),
    Template(
        "one of the pictures shows a {colour} {shape}", lambda a, b, w: (w["colour"], w["shape"]) in (a, b)
    ),
    Template("exactly one picture shows a {shape}", lambda a, b, w: (a[1], b[1]).count(w["shape"]) == 1),
    Template(
        "one shape is {colour} and the other is {other}",
        lambda a, b, w: {a[0], b[0]} == {w["colour"], w["other"]},
    ),
    Template("the two pictures show the same shape", lambda a, b, w: a[1] == b[1]),
    Template("the two shapes have different colors", lambda a, b, w: a[0] != b[0]),
)


def statements(pictures: dict[str, tuple[str, str]], part: str) -> list[dict[str, Any]]:
    """Entries {"images", "sentence", "label", "identifier"} about `pictures`: {path: (colour, shape)}.

    part: "train", "val" or "test", which gives their number (`PAIRS`) and the seed; half are true. The same pictures
    give the same statements. Empty if no two pictures differ.
    """
    rng = Random(f"easy-nlvr {part}")
    paths = sorted(pictures)
    colours = sorted({colour for colour, _ in pictures.values()})
    shapes = sorted({shape for _, shape in pictures.values()})
    if len(colours) < 2 or len(shapes) < 2:
        return []
    having = {word: [path for path in paths if word in pictures[path]] for word in (*colours, *shapes)}
    entries: list[dict[str, Any]] = []
    while len(entries) < PAIRS[part]:
        template = rng.choice(TEMPLATES)
        colour, other = rng.sample(colours, 2)
        words = {
            "colour": colour,
            "other": other,
            "shape": rng.choice(shapes),
            "side": rng.choice(["left", "right"]),
        }
        named = [word for key, word in words.items() if f"{{{key}}}" in template.sentence and word in having]
        both = [_pair(rng, pictures, paths, having, named, template, words, label) for label in (True, False)]
        if None in both:  # these pictures cannot make it both true and false
            continue
        for label, pair in zip(("True", "False"), both, strict=True):
            identifier = f"{part}-{len(entries) // 2}-{label.lower()}"
            sentence = template.sentence.format(**words)
            entries.append({"images": pair, "sentence": sentence, "label": label, "identifier": identifier})
    return entries


def _pair(
    rng: Random,
    pictures: dict[str, tuple[str, str]],
    paths: list[str],
    having: dict[str, list[str]],
    named: list[str],
    template: Template,
    words: dict[str, str],
    label: bool,
) -> list[str] | None:
    """Two different pictures of which the statement is `label`; None if a thousand draws find none."""
    for _ in range(1000):
        pools = [having[rng.choice(named)] if named and rng.random() < 0.5 else paths for _ in range(2)]
        left, right = (rng.choice(pool) for pool in pools)
        if left != right and template.true(pictures[left], pictures[right], words) == label:
            return [left, right]
    return None
