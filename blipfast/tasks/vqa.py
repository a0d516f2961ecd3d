"""Visual question answering: fine-tuning on weighted answers; evaluation by ranking a list of answers or generating.

VQA v2 with Visual Genome, and one's own questions. Source: official `train_vqa.py`. Each question is answered exactly
once (official BLIP repeats some of the last ones), and each picture is encoded once for all of its questions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from blipfast.config import Config
from blipfast.data.loader import build_train_loader
from blipfast.data.text_augment import text_augment
from blipfast.data.transforms import eval_transform
from blipfast.data.views import PictureView, in_batches
from blipfast.data.vqa import VQADataset, common_answers, read_answers
from blipfast.models import gather
from blipfast.models.blip_vqa import BLIP_VQA
from blipfast.vqa_metrics import vqa_metrics

from .finetune import FineTuneTask, Trainable, augmentation, model_settings, write_json
from .sharing import collect, from_main, my_share

ANSWERS = "answer_list.json"  # in the run folder, when data.answers names none

log = logging.getLogger("blipfast")


class VQAModel(Trainable, BLIP_VQA):
    """BLIP_VQA behind the interface of the training loop: a batch in, a mapping with "loss" out."""

    def forward(self, batch: dict[str, Any], *, alpha: float) -> dict[str, Tensor]:
        loss = super().forward(
            batch["image"], batch["question"], batch["answers"], n=batch["n"], weights=batch["weights"]
        )
        return {"loss": loss}

    def answers(
        self, image: Tensor, image_of: list[int], question: list[str], candidates: list[str], k: int
    ) -> list[str]:
        """Answers to questions about pictures [M, 3, S, S]: the best of `candidates`, generated if there are none."""
        how = dict(train=False, image_of=image_of)
        if not candidates:
            return super().forward(image, question, inference="generate", **how)
        best = super().forward(image, question, candidates, inference="rank", k_test=k, **how)
        return [candidates[i] for i in best.tolist()]


class VQATask(FineTuneTask):
    """Fine-tuning on questions and their annotators' answers; the best weights by VQA accuracy."""

    best_metric = "accuracy"

    def build_loader(self):
        config = self.config
        questions = open_questions(config, "train")
        if not config.data.answers:
            path = Path(config.output) / ANSWERS
            write_json(path, common_answers(questions))
            config.data.answers = str(path)  # the run's config.yaml then says what is ranked
        arguments = (config.seed, self.rank, self.world_size, text_augment(config.data), questions)
        return build_train_loader(config.data, config.train, augmentation(config), *arguments)

    def check_evaluation(self) -> None:
        if self.config.data.answers:
            read_answers(self.config.data.answers)
        for split in ("val", "test"):
            if getattr(self.config.data, split):
                questions = open_questions(self.config, split)
                bare = [i for i in range(len(questions)) if split == "val" and not questions.answers(i)]
                if bare:
                    raise ValueError(
                        f"{self.config.data.val}: {len(bare)} of {len(questions)} questions have no answer, so the "
                        "weights cannot be judged on them. Leave those out of data.val."
                    )

    @classmethod
    def build_model(cls, config: Config) -> VQAModel:
        model = VQAModel(**model_settings(config))
        model.compat = "official" if config.evaluate.official_quirks else "masked"
        model.text_decoder.config.label_smoothing = config.loss.label_smoothing
        for text_model in (model.text_encoder, model.text_decoder.bert):
            text_model.config.gradient_checkpointing = config.model.text_grad_ckpt
        return model

    @classmethod
    @torch.no_grad()
    def evaluate_checkpoint(
        cls, config: Config, checkpoint: Path, split: str, output: Path, device: torch.device
    ) -> dict[str, float]:
        """VQA accuracy in per cent, also by answer type, where the file has answers; else the number of questions.

        In `output`: vqa_result.json, [{"question_id", "answer"}], which the VQA server takes.
        """
        questions, settings = open_questions(config, split), config.evaluate
        candidates = answer_list(config) if settings.inference == "rank" else []
        model = cls.load_model(config, checkpoint, device)
        found: dict[int, str] = {}
        for numbers, pictures, image_of in question_batches(config, questions):
            asked = [questions.question(i) for i in numbers]
            answers = model.answers(pictures.to(device), image_of, asked, candidates, settings.k_test)
            found |= zip(numbers, answers, strict=True)
        answers = collect(found, len(questions))
        return from_main(lambda: report(questions, answers, candidates, output))


def open_questions(config: Config, split: str) -> VQADataset:
    """The questions of data.train, data.val or data.test. Raises FileNotFoundError or ValueError naming the file."""
    data = config.data
    text = dict(clean=data.clean_captions, max_words=data.max_words)
    return VQADataset(getattr(data, split), data.root(split), data.vg_root, split=split, **text)


def answer_list(config: Config) -> list[str]:
    """The answers to rank: those of data.answers, or the most frequent ones of data.train."""
    if config.data.answers:
        return read_answers(config.data.answers)
    if not config.data.train:
        raise ValueError("data.answers is empty: name a JSON list of the answers to rank, or data.train.")
    return common_answers(open_questions(config, "train"))


def question_batches(config: Config, questions: VQADataset) -> Iterator[tuple[list[int], Tensor, list[int]]]:
    """This rank's questions, all those about a picture together: their numbers, pictures, and whose picture is whose.

    (numbers of B questions, [M, 3, S, S], picture of each question [B] in 0 ... M - 1). A batch has about
    evaluate.batch_size questions; ranks share the pictures.
    """
    mine = list(my_share(questions.pictures))
    about: dict[int, list[int]] = {picture: [] for picture in mine}
    for number, picture in enumerate(questions.picture_of.tolist()):
        if picture in about:
            about[picture].append(number)
    each = max(1, config.evaluate.batch_size * len(mine) // max(1, sum(map(len, about.values()))))
    view = PictureView(questions, eval_transform(config.model.image_size))
    batches = in_batches(view, mine, each, config.data.workers)
    total = -(-len(mine) // each)
    for pictures, tensor in tqdm(batches, "answering", total, leave=False, disable=gather.rank() > 0 or None):
        image_of = [place for place, picture in enumerate(pictures) for _ in about[picture]]
        yield [number for picture in pictures for number in about[picture]], tensor, image_of


def report(
    questions: VQADataset, answers: list[str], candidates: list[str], output: Path
) -> dict[str, float]:
    """Write vqa_result.json, one answer a question id, and give the accuracy; on one rank."""
    results = {questions.question_id(i): answer for i, answer in enumerate(answers)}
    if len(results) < len(answers):
        log.warning(
            "%d questions repeat a question_id; the last answer is kept.", len(answers) - len(results)
        )
    write_json(output / "vqa_result.json", [{"question_id": id, "answer": a} for id, a in results.items()])
    metrics: dict[str, float] = {"questions": len(answers)}
    truths = [questions.answers(i) for i in range(len(questions))]
    if not all(truths):
        return metrics
    if candidates:
        known = set(candidates)
        metrics["answerable"] = 100 * sum(not known.isdisjoint(truth) for truth in truths) / len(truths)
    return vqa_metrics(answers, truths, questions.answer_types or None) | metrics
