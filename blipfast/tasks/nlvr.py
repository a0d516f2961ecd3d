"""NLVR2, is a sentence true of two pictures: fine-tuning and accuracy.

Source: official `train_nlvr.py`. The pictures are never swapped in evaluation, which official BLIP does at random;
evaluate.official_quirks does it too (the same swaps every time).
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from blipfast.config import Config
from blipfast.data.loader import build_train_loader
from blipfast.data.nlvr import NLVRDataset, other_side
from blipfast.data.sampling import mix
from blipfast.data.text_augment import text_augment
from blipfast.data.transforms import eval_transform
from blipfast.data.views import PictureView, in_batches
from blipfast.models import gather
from blipfast.models.blip_nlvr import BLIP_NLVR, twin_weights

from .finetune import FineTuneTask, Trainable, augmentation, model_settings, write_json
from .sharing import collect, my_share


class NLVRModel(Trainable, BLIP_NLVR):
    """BLIP_NLVR behind the interface of the training loop: a batch in, a mapping with "loss" out."""

    adapt = staticmethod(twin_weights)  # of a checkpoint whose cross-attention reads one picture

    def forward(self, batch: dict[str, Any], *, alpha: float) -> dict[str, Tensor]:
        return {"loss": super().forward(batch["image"], batch["sentence"], batch["label"])}

    def truth(self, image: Tensor, sentence: list[str], pair_of: list[int]) -> Tensor:
        """Probability [B] that each sentence is true of its pair in image [2 M, 3, S, S] (see BLIP_NLVR)."""
        return super().forward(image, sentence, None, train=False, pair_of=pair_of).float().softmax(1)[:, 1]


class NLVRTask(FineTuneTask):
    """Fine-tuning on statements about two pictures; the best weights by accuracy."""

    best_metric = "accuracy"

    def build_loader(self):
        config = self.config
        arguments = (config.seed, self.rank, self.world_size, text_augment(config.data))
        statements = open_statements(config, "train")
        return build_train_loader(config.data, config.train, augmentation(config), *arguments, statements)

    def check_evaluation(self) -> None:
        for split in ("val", "test"):
            if getattr(self.config.data, split):
                open_statements(self.config, split)

    @classmethod
    def build_model(cls, config: Config) -> nn.Module:
        model = NLVRModel(**model_settings(config))
        model.text_encoder.config.gradient_checkpointing = config.model.text_grad_ckpt
        return model

    @classmethod
    @torch.no_grad()
    def evaluate_checkpoint(
        cls, config: Config, checkpoint: Path, split: str, output: Path, device: torch.device
    ) -> dict[str, float]:
        """Accuracy in per cent, and that of always giving the commoner label; neither if labels are hidden.

        In `output`: nlvr_result.json, [{"identifier", "label": "True" or "False", "probability": of "True"}].
        """
        statements = open_statements(config, split)
        view = PairView(config, statements)
        model = cls.load_model(config, checkpoint, device)
        share = list(my_share(len(view)))
        size = max(1, config.evaluate.batch_size * len(view) // len(statements))
        found: dict[int, float] = {}
        batches = in_batches(view, share, size, config.data.workers)
        total = -(-len(share) // size)
        for places, pairs in tqdm(batches, "judging", total, leave=False, disable=gather.rank() > 0 or None):
            numbers = [i for place in places for i in view.about[place]]
            pair_of = [row for row, place in enumerate(places) for _ in view.about[place]]
            image = pairs.transpose(0, 1).flatten(0, 1).to(device)
            sentences = [view.sentence(i) for i in numbers]
            found |= zip(numbers, model.truth(image, sentences, pair_of).tolist())
        probabilities = torch.tensor(collect(found, len(statements)))
        predicted, labels = probabilities > 0.5, torch.from_numpy(statements.labels) == 1
        results = [
            {
                "identifier": statements.identifier(i),
                "label": str(bool(predicted[i])),
                "probability": probability,
            }
            for i, probability in enumerate(probabilities.tolist())
        ]
        write_json(output / "nlvr_result.json", results)
        if statements.hidden:
            return {"statements": len(statements)}
        share_true = labels.float().mean().item()
        return {
            "accuracy": 100 * (predicted == labels).float().mean().item(),
            "prior": 100 * max(share_true, 1 - share_true),
            "statements": len(statements),
        }


class PairView(Dataset):
    """`[p] -> float32 [2, 3, S, S]`, the pictures of a pair, each pair once; statements `about[p]` are about it."""

    def __init__(self, config: Config, statements: NLVRDataset):
        self.statements, self.seed, self.swaps = statements, config.seed, config.evaluate.official_quirks
        self.pictures = PictureView(statements, eval_transform(config.model.image_size))
        about: dict[tuple[int, ...], list[int]] = {}
        for i, pair in enumerate(statements.picture_of.tolist()):
            about.setdefault(tuple(pair[::-1] if self.swapped(i) else pair), []).append(i)
        self.pairs, self.about = list(about), list(about.values())

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, p: int) -> Tensor:
        return torch.stack([self.pictures[picture] for picture in self.pairs[p]])

    def sentence(self, i: int) -> str:
        sentence = self.statements.sentence(i)
        return other_side(sentence) if self.swapped(i) else sentence

    def swapped(self, i: int) -> bool:
        return self.swaps and Random(mix(self.seed, i)).random() < 0.5


def open_statements(config: Config, split: str) -> NLVRDataset:
    """The statements of data.train, data.val or data.test. Raises FileNotFoundError or ValueError naming the file."""
    data = config.data
    how = dict(split=split, swap=data.swap, clean=data.clean_captions, max_words=data.max_words)
    return NLVRDataset(getattr(data, split), data.root(split), **how)
