"""Questions about pictures: VQA v2, Visual Genome's, and one's own, in official BLIP's JSON."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blipfast.data.pairs import PackedStrings
from blipfast.data.pictures import Pictures, PicturesDataset, root_setting
from blipfast.data.readers import checked_entries
from blipfast.data.schemas import FORMATS, Entry
from blipfast.text import pre_question

VG_WEIGHT = 0.2  # of Visual Genome's single answers (official)
ANSWERS = 3128  # in the official list


class VQADataset(PicturesDataset):
    """Questions of one source or several: `[i] -> {"image": uint8 [3|4, H, W], "question", "answers", "weights"}`.

    sources: files of JSON or JSON lines with the official keys (see `schemas`). Pictures are relative to `image_root`,
    those of entries with "dataset": "vg" to `vg_root`; where `vg_root` is empty, to `image_root`, and where that is,
    to the file's own folder. "answer" is a text or one text an annotator; `weights` of the distinct `answers` are
    their shares, or 0.2 for Visual Genome's, as officially. Only the split "train" must have answers.
    clean: apply official `pre_question`, which also cuts to `max_words`.
    Raises FileNotFoundError or ValueError naming file, line and key.
    """

    text_key = "question"

    def __init__(
        self,
        sources: str | Sequence[str],
        image_root: str = "",
        vg_root: str = "",
        *,
        split: str = "train",
        clean: bool = True,
        max_words: int = 50,
    ):
        sources = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
        if not sources:
            raise ValueError("data.train is empty: name at least one file of questions.")
        self.split, self.clean, self.max_words = split, clean, max_words
        self._pictures = Pictures()
        self._questions, self._answers, self._ids = PackedStrings(), PackedStrings(), PackedStrings()
        self._is_vg, picture_of = bytearray(), array("q")
        self.answer_types: list[str] = []  # one a question, or empty if the files do not give each one
        for source in sources:
            start, path = len(self), Path(source).expanduser()
            own = os.path.expanduser(image_root) or str(path.parent)
            roots = {"": own, "vg": os.path.expanduser(vg_root) or own}
            for value, entry in checked_entries(path, "vqa", split):
                self._add(value, entry, roots, picture_of)
            if start == len(self):
                raise ValueError(f"{path}: there are no questions in it. {FORMATS['vqa'].expected}.")
            settings = [root_setting("image_root", image_root), root_setting("vg_root", vg_root)]
            self._pictures.check(str(path), np.array(picture_of[start:]), ", ".join(settings))
        if len(self.answer_types) < len(self):
            self.answer_types = []
        self._pictures.complete()
        self.picture_of = np.array(picture_of)

    def _add(self, value: dict[str, Any], entry: Entry, roots: dict[str, str], picture_of: array) -> None:
        picture_of.append(self._pictures.add(os.path.join(roots[entry.root], entry.pictures[0])))
        self._questions.append(entry.texts[0])
        self._answers.append(json.dumps(entry.answers))
        self._ids.append(json.dumps(value.get("question_id", len(self._ids))))
        self._is_vg.append(entry.root == "vg")
        if isinstance(value.get("answer_type"), str):
            self.answer_types.append(value["answer_type"])

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": self.load_picture(int(self.picture_of[i])), **self.annotation(i)}

    def annotation(self, i: int) -> dict[str, Any]:
        """Sample `i` without its picture."""
        answers = Counter(self.answers(i))
        total = sum(answers.values())
        weights = [VG_WEIGHT if self._is_vg[i] else count / total for count in answers.values()]
        return {"question": self.question(i), "answers": list(answers), "weights": weights}

    def question(self, i: int) -> str:
        """Question `i`, cleaned."""
        question = self._questions[i]
        return pre_question(question, self.max_words) if self.clean else question

    def answers(self, i: int) -> list[str]:
        """What each annotator answered to question `i`; empty if nobody did."""
        return json.loads(self._answers[i])

    def question_id(self, i: int) -> Any:
        """The id given in the file, else the question's place."""
        return json.loads(self._ids[i])

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Official `vqa_collate_fn`: questions, all answers in a row, their weights, and how many each question has."""
        weights = [weight for sample in samples for weight in sample["weights"]]
        return {
            "question": [sample["question"] for sample in samples],
            "answers": [answer for sample in samples for answer in sample["answers"]],
            "weights": torch.tensor(weights, dtype=torch.float32),
            "n": [len(sample["answers"]) for sample in samples],
        }


def read_answers(path: str) -> list[str]:
    """The answers to rank, from a JSON list of texts (official `answer_list.json`); repeated ones count once."""
    try:
        answers = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: there is no such answer list. Set data.answers to a JSON list of answers, or leave it empty "
            "to rank the most frequent answers of data.train."
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Expected a list of answers.") from None
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a for a in answers):
        raise ValueError(f'{path}: expected a JSON list of answers, such as ["yes", "no", "2"].')
    return list(dict.fromkeys(answers))


def common_answers(questions: VQADataset, most: int = ANSWERS) -> list[str]:
    """The `most` frequent answers of a set, for when there is no list; each question counts its commonest one."""
    counts = Counter(
        Counter(questions.answers(i)).most_common(1)[0][0]
        for i in range(len(questions))
        if questions.answers(i)
    )
    return [answer for answer, _ in counts.most_common(most)]
