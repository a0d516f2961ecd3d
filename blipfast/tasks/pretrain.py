"""Pre-training on image-text pairs: ITC, ITM, LM (and MLM), and what the trained model can do on a test set."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from blipfast.config import Config, LossConfig
from blipfast.data.loader import build_train_loader
from blipfast.data.text_augment import text_augment
from blipfast.data.views import open_retrieval
from blipfast.models.blip_pretrain import BLIP_Pretrain
from blipfast.models.checkpoint import WEIGHTS, load_checkpoint

from .curves import plot_curves
from .evaluation import evaluate
from .finetune import augmentation, export_weights, model_settings, write_json
from .sharing import from_main


class PretrainModel(BLIP_Pretrain):
    """BLIP_Pretrain behind the interface of the training loop: a batch in, a mapping with "loss" out."""

    self_updating = False

    def __init__(self, loss: LossConfig, **settings):
        super().__init__(**settings)
        self.loss_weights = {
            "loss_ita": loss.itc,
            "loss_itm": loss.itm,
            "loss_lm": loss.lm,
            "loss_mlm": loss.mlm,
        }

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
        **model_settings(config),
        embed_dim=model.embed_dim,
        queue_size=model.queue_size,
        momentum=model.momentum,
        vit_init=model.init_vit,
        bert_init=model.init_bert,
        max_tokens=config.data.max_tokens,
        duplicates=loss.duplicates,
        queue_warmup=loss.queue_warmup,
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
        load_checkpoint(built, model.init_from, allow_missing=False, allow_random=model.allow_random)
    return built


class PretrainTask:
    """What the training loop runs: a model, a loader, the alpha ramp, and an evaluation when there is a test set."""

    def __init__(self, config: Config, rank: int = 0, world_size: int = 1):
        self.config, self.rank = config, rank
        data = config.data
        self.loader = build_train_loader(
            data, config.train, augmentation(config), config.seed, rank, world_size, text_augment(data)
        )
        self.test = open_retrieval(data) if data.test else None
        self.model = build_model(config)
        self.start = time.time()

    def alpha(self, step: int, steps_per_epoch: int) -> float:
        """Weight of the momentum targets."""
        return self.config.loss.alpha_at(step, steps_per_epoch)

    def evaluate(self, model: PretrainModel, epoch: int) -> dict[str, float] | None:
        """Export the weights to the run folder and evaluate them there, on all ranks. None without a test set."""
        run, device = Path(self.config.output), next(model.parameters()).device
        from_main(lambda: export_weights(model, run / WEIGHTS))
        if self.test is None:
            return None
        metrics = evaluate(self.config, self.test, run, run, device)
        metrics["seconds"] = time.time() - self.start
        write_json(run / "metrics.json", metrics)
        return metrics

    @classmethod
    def evaluate_checkpoint(
        cls, config: Config, checkpoint: Path, split: str, output: Path, device: torch.device
    ) -> dict[str, float]:
        """The same figures of any checkpoint, for `blipfast evaluate`."""
        return evaluate(config, open_retrieval(config.data, split=split), checkpoint, output, device)

    def finish(self, model: PretrainModel, metrics: dict[str, float]) -> None:
        """Draw the curves and say where everything is."""
        if self.rank:
            return
        run = Path(self.config.output)
        plot_curves(run / "log.jsonl", run / "curves.png")
        print(f"weights, tokenizer, config and curves: {run}/", flush=True)
        if metrics:
            print(f"look at {run / 'gallery.html'}; figures: {run / 'metrics.json'}", flush=True)
