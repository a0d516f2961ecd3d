"""Captioning: fine-tuning with the LM loss, and captions of a test set scored by BLEU, ROUGE-L and CIDEr.

COCO (Karpathy's split), NoCaps (data.format nocaps), and one's own JSONL or folder. Source: official
`train_caption.py` and `eval_nocaps.py`. Lengths count the prompt's tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from blipfast.caption_metrics import caption_metrics, check_scorer
from blipfast.config import Config
from blipfast.data.nocaps import NoCapsView
from blipfast.data.schemas import KARPATHY
from blipfast.data.transforms import eval_transform
from blipfast.data.views import CaptionView, in_batches
from blipfast.models import gather
from blipfast.models.blip import BLIP_Decoder
from blipfast.ptb import tokenize

from .captioning import captions_of, check_search
from .finetune import FineTuneTask, Trainable, model_settings, write_json
from .gallery import Caption, Gallery, sample, write_gallery
from .sharing import from_main, my_share

View = CaptionView | NoCapsView


class CaptionModel(Trainable, BLIP_Decoder):
    """BLIP_Decoder behind the interface of the training loop: a batch in, a mapping with "loss" out."""

    def forward(self, batch: dict[str, Any], *, alpha: float) -> dict[str, Tensor]:
        return {"loss": super().forward(batch["image"], batch["caption"])}


class CaptionTask(FineTuneTask):
    """Fine-tuning on (picture, caption) after data.prompt; the best weights by CIDEr + BLEU-4, as official BLIP's."""

    best_metric = "CIDEr+Bleu_4"
    figures = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr", "METEOR", "SPICE", "caption_exact")

    def __init__(self, config: Config, rank: int = 0, world_size: int = 1):
        super().__init__(config, rank, world_size)
        if config.data.val or config.data.test:
            check_search(self.model, config.evaluate)

    @classmethod
    def build_model(cls, config: Config) -> CaptionModel:
        model = CaptionModel(prompt=config.data.prompt, **model_settings(config))
        model.text_decoder.config.label_smoothing = config.loss.label_smoothing
        model.text_decoder.bert.config.gradient_checkpointing = config.model.text_grad_ckpt
        return model

    def check_evaluation(self) -> None:
        check_scorer(self.config.evaluate.scorer)
        for split in ("val", "test"):
            if getattr(self.config.data, split):
                open_view(self.config, split)

    @classmethod
    @torch.no_grad()
    def evaluate_checkpoint(
        cls, config: Config, checkpoint: Path, split: str, output: Path, device: torch.device
    ) -> dict[str, float]:
        """Scores of the captions of every picture (see `score`), and in `output`:

        {split}.json, see `results`; and gallery.html.
        """
        view, settings = open_view(config, split), config.evaluate
        model = cls.load_model(config, checkpoint, device)
        model.prompt = settings.prompt or model.prompt
        pictures, share = Prepared(view, config.model.image_size), my_share(len(view))
        batches = in_batches(pictures, share, settings.batch_size, config.data.workers)
        on_device = (batch.to(device) for _, batch in batches)
        captions = captions_of(model, on_device, share, len(view), settings)
        write_json(output / f"{split}.json", results(view, captions, config.data.format))
        metrics = from_main(lambda: score(view, captions, settings.scorer))
        if gather.rank() == 0 and settings.gallery:
            write_gallery(output / "gallery.html", gallery(view, captions, settings.gallery, metrics))
        return metrics


def open_view(config: Config, split: str) -> View:
    """The pictures of data.val or data.test with their captions word for word.

    Raises FileNotFoundError or ValueError naming file, line and key.
    """
    data = config.data
    source, root = getattr(data, split), data.root(split)
    if data.format == "nocaps":
        return NoCapsView(source, root, split)
    format = data.format if data.format in KARPATHY else "auto"
    return CaptionView(source, root, format=format, split=split, clean_captions=False)


class Prepared(Dataset):
    """`[i] -> float32 [3, S, S]`: the pictures of a view, ready for the model."""

    def __init__(self, view: View, image_size: int):
        self.view, self.transform = view, eval_transform(image_size)

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(self.view.picture(i), None)


def results(view: View, captions: list[str], format: str) -> list[dict[str, Any]]:
    """[{"image_id", "caption"}], as COCO's and NoCaps's servers take it; of one's own pictures "image" says which."""
    rows = [{"image_id": i, "caption": c} for i, c in zip(view.image_ids, captions, strict=True)]
    if isinstance(view, CaptionView) and format not in KARPATHY:
        return [row | {"image": image} for row, image in zip(rows, view.image, strict=True)]
    return rows


def score(view: View, captions: list[str], scorer: str = "blipfast") -> dict[str, float]:
    """Bleu_1 ... Bleu_4, ROUGE_L, CIDEr (and METEOR, SPICE, see `caption_metrics`) of captions in the view's order.

    And caption_exact, per cent of the captions that are a true one word for word. Of NoCaps's own file also the scores
    by domain, each a set of its own: in_CIDEr, near_CIDEr, out_CIDEr, ... The number of pictures alone where there is
    nothing to compare with.
    """
    metrics: dict[str, float] = {"images": len(captions)}
    if not view.references:
        return metrics
    written = dict(zip(view.image_ids, captions, strict=True))
    metrics |= caption_metrics(written, view.references, scorer)
    exact = [tokenize(c) in map(tokenize, view.references[i]) for i, c in written.items()]
    metrics["caption_exact"] = 100 * sum(exact) / len(exact)
    domains = getattr(view, "domains", {})
    for domain in dict.fromkeys(filter(None, domains.values())):
        chosen = {i: caption for i, caption in written.items() if domains[i] == domain}
        figures = caption_metrics(chosen, {i: view.references[i] for i in chosen}, scorer)
        metrics |= {f"{domain.removesuffix('-domain')}_{name}": value for name, value in figures.items()}
    return metrics


def gallery(view: View, captions: list[str], count: int, metrics: dict[str, float]) -> Gallery:
    """A fixed random sample of `count` pictures with what was written and what is true."""
    cards = [
        Caption(view.picture(i), captions[i], view.references.get(view.image_ids[i], []))
        for i in sample(len(view), count)
    ]
    return Gallery("Captions by blipfast", metrics, captions=cards)
