"""easy-VQA: questions about pictures of one coloured shape, from the PyPI package `easy-vqa` 1.0 (MIT).

4,000 pictures of 64 px and 38,575 questions to train on, 1,000 and 9,673 to test on (the published split), 13 answers;
about three questions in four are answered yes or no. Author: Victor Zhou, https://github.com/vzhou842/easy-VQA.
Nothing is downloaded here: the package is installed, or its wheel is given.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from blipfast.data import easy_nlvr

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
HELD_OUT = 20  # one training picture in so many is for validation
MARKER = "easy-vqa.json"  # what unpack() leaves in a folder to know it again

Folder = Path | zipfile.Path


class Question(NamedTuple):
    """One of the package's questions; `picture` is the number in the name of the picture's file."""

    text: str
    answer: str
    picture: int


def unpack(directory: str | os.PathLike, wheel: str | os.PathLike | None = None) -> Path:
    """Write easy-VQA in official BLIP's formats into `directory`, and what is made from it.

    `{train,test}/{number}.png`: the pictures.
    `vqa_{train,val,test}.json`, `answer_list.json`: the questions; those about every 20th training picture are for
        validation. The test set is the published one.
    `nlvr_{train,dev,test}.json`: statements about two pictures of the same part, see `easy_nlvr`.
    `captions.jsonl`, `captions_test.jsonl`: "a blue rectangle" for pictures of which the questions tell so much.
    `texts.txt`: the distinct questions, answers, statements and captions to train on, for a tokenizer.

    wheel: easy_vqa-1.0-py3-none-any.whl, if the package is not installed. Returns the folder, which appears complete
    or not at all; where the set lies already nothing is done. Raises ImportError without package and wheel,
    FileExistsError if `directory` holds something else, ValueError for a wheel or package that is not easy-VQA.
    """
    directory = Path(directory)
    if (directory / MARKER).is_file():
        return directory
    source = _source(wheel)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory}: there is something else already. Choose another folder.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        fresh = Path(scratch, "fresh")
        counts = _write(source, fresh)
        (fresh / MARKER).write_text(json.dumps(counts), encoding="utf-8")
        if directory.exists():
            directory.rmdir()
        fresh.rename(directory)
    return directory


def read_questions(source: Folder, split: str) -> list[Question]:
    """The questions of the package's "train" or "test" split."""
    path = source / "data" / split / "questions.json"
    try:
        return [Question(*entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not easy-VQA's questions ({error}). Install easy-vqa 1.0.") from None


def facts(questions: Iterable[Question]) -> dict[int, tuple[str, str]]:
    """(colour, shape) of each picture whose questions and answers tell both."""
    colours: dict[int, str] = {}
    shapes: dict[int, str] = {}
    for text, answer, picture in questions:
        words = re.findall(r"\w+", text)
        if answer in ("yes", "no"):
            named = words if (answer == "yes") != ("not" in words or "no" in words) else []
        else:
            named = [*words, answer]
        for word in named:
            if word in COLOURS:
                colours[picture] = word
            elif word in SHAPES:
                shapes[picture] = word
    return {picture: (colours[picture], shapes[picture]) for picture in colours if picture in shapes}


def _source(wheel: str | os.PathLike | None) -> Folder:
    """The package's folder, installed or inside a wheel."""
    if wheel is not None:
        try:
            return zipfile.Path(zipfile.ZipFile(wheel), "easy_vqa/")
        except zipfile.BadZipFile as error:
            raise ValueError(f"{wheel}: not a wheel ({error}).") from None
    spec = find_spec("easy_vqa")
    if spec is None or not spec.origin:
        raise ImportError(
            "easy-VQA is not installed: pip install 'blipfast[easy-vqa]', or give its wheel with --wheel."
        )
    return Path(spec.origin).parent


def _write(source: Folder, folder: Path) -> dict[str, int]:
    """Everything `unpack` promises; returns the number of entries of each file."""
    parts = {"test": read_questions(source, "test"), "train": [], "val": []}
    for question in read_questions(source, "train"):
        parts["val" if question.picture % HELD_OUT == 0 else "train"].append(question)
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        for picture in (source / "data" / split / "images").iterdir():
            if picture.name.endswith(".png"):
                (folder / split / picture.name).write_bytes(picture.read_bytes())
    files: dict[str, list[Any]] = {"answer_list.json": sorted({q.answer for q in parts["train"]})}
    texts: list[str] = list(files["answer_list.json"])
    for part, questions in parts.items():
        where = "test" if part == "test" else "train"
        files[f"vqa_{part}.json"] = [_vqa_entry(i, where, question) for i, question in enumerate(questions)]
        shown = {f"{where}/{picture}.png": fact for picture, fact in facts(questions).items()}
        captions = [
            {"image": image, "caption": f"a {colour} {shape}"} for image, (colour, shape) in shown.items()
        ]
        statements = easy_nlvr.statements(shown, part)
        files[f"nlvr_{'dev' if part == 'val' else part}.json"] = statements
        if part == "train":
            texts += [q.text for q in questions] + [s["sentence"] for s in statements]
            texts += [c["caption"] for c in captions]
        if part != "val":
            files["captions.jsonl" if part == "train" else "captions_test.jsonl"] = captions
    for name, entries in files.items():
        lines = ",\n".join(map(json.dumps, entries)) if name.endswith(".json") else ""
        text = f"[\n{lines}\n]\n" if lines else "".join(json.dumps(entry) + "\n" for entry in entries)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "texts.txt").write_text("\n".join(dict.fromkeys(texts)) + "\n", encoding="utf-8")
    return {name: len(entries) for name, entries in files.items()}


def _vqa_entry(number: int, folder: str, question: Question) -> dict[str, Any]:
    """A question with the official keys."""
    return {
        "question_id": number,
        "question": question.text,
        "answer": [question.answer],
        "answer_type": "yes/no" if question.answer in ("yes", "no") else "other",
        "image": f"{folder}/{question.picture}.png",
        "dataset": "vqa",
    }
