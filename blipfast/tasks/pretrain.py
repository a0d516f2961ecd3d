"""Pre-training on image-text pairs: ITC, ITM, LM (and MLM), and what the trained model can do on a test set."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from blipfast.config import Config, LossConfig
from blipfast.metrics import retrieval_metrics
from blipfast.models.blip_pretrain import BLIP_Pretrain
from blipfast.models.checkpoint import load_checkpoint
from blipfast.models.run import load_captioner, load_matcher
from blipfast.text import load_tokenizer

from .scoring import Collection


class PretrainModel(BLIP_Pretrain):
    """BLIP_Pretrain behind the interface of the training loop: a batch in, a mapping with "loss" out."""

    self_updating = False

    def __init__(self, loss: LossConfig, **settings):
        super().__init__(**settings)
        self.loss_weights = {"loss_ita": loss.itc, "loss_itm": loss.itm, "loss_lm": loss.lm, "loss_mlm": loss.mlm}

    def forward(self, batch: dict, *, alpha: float) -> dict[str, Tensor]:
        out = super().forward(batch["image"], batch["caption"], alpha, return_dict=True)
        loss = sum(weight * out[name] for name, weight in self.loss_weights.items() if weight)
        logged = {name.replace("ita", "itc"): value.detach() for name, value in out.items()}
        return logged | {"loss": loss}


def build_model(config: Config) -> PretrainModel:
    """The model a config describes, its starting weights loaded."""
    model, loss = config.model, config.loss
    built = PretrainModel(
        loss,
        med_config=model.med_config,
        image_size=model.image_size,
        vit=model.vit,
        vit_grad_ckpt=model.vit_grad_ckpt,
        vit_ckpt_layer=model.vit_ckpt_layer,
        embed_dim=model.embed_dim,
        queue_size=model.queue_size,
        momentum=model.momentum,
        tokenizer=load_tokenizer(model.tokenizer),
        vit_init=model.init_vit,
        bert_init=model.init_bert,
        max_tokens=config.data.max_tokens,
        duplicates=loss.duplicates,
        negative_all_rank=loss.negative_all_rank,
        mlm_probability=loss.mlm_probability if loss.mlm else 0.0,
        temperature=loss.temperature,
    )
    built.momentum_dropout = model.momentum_dropout
    built.temperature_limits = (loss.temperature_min, loss.temperature_max)
    for text_model in (built.text_encoder, built.text_decoder.bert):
        text_model.config.gradient_checkpointing = model.text_grad_ckpt
    built.text_decoder.config.label_smoothing = loss.label_smoothing
    if model.init_from:
        load_checkpoint(built, model.init_from)
    return built


def alpha(config: Config, step: int, steps_per_epoch: int) -> float:
    """Weight of the momentum targets at an optimizer step: a linear ramp over `alpha_ramp_epochs`, then constant."""
    ramp = config.loss.alpha_ramp_epochs * steps_per_epoch
    return config.loss.alpha * min(1.0, step / ramp if ramp else 1.0)


class PretrainTask:
    """What the training loop runs: a model, a loader, the alpha ramp, and an evaluation when there is a test set."""

    def __init__(self, config: Config, rank: int = 0, world_size: int = 1):
        self.config = config
        train_augment = text_augment(config.data)
        transform = train_transform(
            config.model.image_size,
            min_scale=config.data.min_scale,
            flip=config.data.flip,
            randaugment=config.data.randaugment,
            noise=config.data.noise,
            background=config.data.background,
        )
        self.loader = build_train_loader(
            config.data, config.train, transform, config.seed, rank, world_size, train_augment
        )
        self.test = open_retrieval(config.data) if config.data.test else None
        self.model = build_model(config)

    def alpha(self, step: int, steps_per_epoch: int) -> float:
        return alpha(self.config, step, steps_per_epoch)

    def evaluate(self, run: Path, device, gallery: bool = True) -> dict[str, float] | None:
        """Retrieval and captioning by the weights in the run folder; None without a test set. On one rank."""
        return None if self.test is None else evaluate(self.config, self.test, run, device, gallery)


@torch.no_grad()
def evaluate(config: Config, test, run: Path, device, gallery: bool = True) -> dict[str, float]:
    """Figures of the model in `run` on a retrieval view, written to run/metrics.json; pictures to run/gallery.html.

    Retrieval recall (official names, per cent) after ITM reranking and, as itc_*, before; ITM accuracy on hard pairs
    beside its prior; the rate of captions equal to the truth; seconds.
    """
    start = time.time()
    settings = config.evaluate
    matcher = load_matcher(run).to(device)
    transform = eval_transform(matcher.visual_encoder.image_size)

    def batches():
        for i in range(0, len(test.image), settings.batch_size):
            yield torch.stack([transform(test[j][0], None) for j in range(i, min(i + settings.batch_size, len(test)))])

    collection = Collection(matcher, batches(), test.text, device, settings.batch_size, progress=True)
    truth = [test.img2txt[i] for i in range(len(test.image))]
    texts = [test.txt2img[i] for i in range(len(test.text))]
    scores = collection.rerank(settings.k_test, progress=True)
    metrics = retrieval_metrics(scores.i2t, scores.t2i, truth, texts)
    before = retrieval_metrics(collection.similarity, collection.similarity.t(), truth, texts)
    metrics |= {f"itc_{name}": value for name, value in before.items()}
    metrics |= {"itm_accuracy": 100 * collection.itm_accuracy(truth), "itm_prior": 200 / 3}

    captioner = load_captioner(run, prompt=settings.prompt).to(device)
    captions: list[str] = []
    for batch in batches():
        captions += captioner.generate(
            batch.to(device),
            num_beams=settings.num_beams,
            max_length=settings.max_length,
            min_length=settings.min_length,
        )
    references = [{test.text[t] for t in own} for own in truth]
    metrics["caption_exact"] = 100 * sum(c in r for c, r in zip(captions, references)) / len(captions)
    metrics |= {"images": len(test.image), "texts": len(test.text), "evaluation_seconds": time.time() - start}
    (run / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics
