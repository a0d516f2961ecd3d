"""Image-text retrieval: fine-tuning (ITC and ITM with image ids), evaluation, and zero-shot retrieval of videos.

Source: official `train_retrieval.py` and `eval_retrieval_video.py`. COCO and Flickr30k in Karpathy's format, MSR-VTT
(`data.format: msrvtt`, evaluation only), or one's own pairs. A clip is encoded frame by frame: the mean of the frames'
projections for ITC, all their tokens one after another for ITM.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.config import Config
from blipfast.data.transforms import eval_transform
from blipfast.data.video import VideoView, open_videos
from blipfast.data.views import RetrievalView, open_retrieval
from blipfast.metrics import ranks, retrieval_metrics
from blipfast.models import gather
from blipfast.models.blip_itm import BLIP_ITM
from blipfast.models.blip_retrieval import BLIP_Retrieval
from blipfast.models.checkpoint import load_checkpoint
from blipfast.quantize import prepare

from .finetune import FineTuneTask, model_settings, write_json
from .gallery import gallery, write_gallery
from .scoring import UNSCORED, Collection, Scores

HITS = 10  # kept for each query in the result file


class RetrievalModel(BLIP_Retrieval):
    """BLIP_Retrieval behind the interface of the training loop: a batch in, a mapping with "loss" out."""

    self_updating = False

    def __init__(self, itc: float, itm: float, **settings):
        super().__init__(**settings)
        self.itc, self.itm = itc, itm

    def forward(self, batch: dict, *, alpha: float) -> dict[str, Tensor]:
        itc, itm = super().forward(batch["image"], batch["caption"], alpha, batch["image_id"])
        logged = {
            "loss_itc": itc.detach(),
            "loss_itm": itm.detach(),
            "temperature": self.temp.detach().clone(),
        }
        return logged | {"loss": self.itc * itc + self.itm * itm}


class RetrievalTask(FineTuneTask):
    """Fine-tuning on (picture, caption, image id), and recall@1/5/10 both ways after ITM reranking, per cent."""

    best_metric = "r_mean"

    def __init__(self, config: Config, rank: int = 0, world_size: int = 1):
        super().__init__(config, rank, world_size)
        if not config.model.init_from:
            self.model.copy_params()  # of encoders that started from init_vit or init_bert
        # Entries of another run's queue carry ids of other pictures (official BLIP takes them for ours).
        self.model.idx_queue.fill_(-100)
        self.model.ptr_queue.zero_()

    @classmethod
    def build_model(cls, config: Config) -> RetrievalModel:
        model, loss = config.model, config.loss
        built = RetrievalModel(
            loss.itc,
            loss.itm,
            **model_settings(config),
            embed_dim=model.embed_dim,
            queue_size=model.queue_size,
            momentum=model.momentum,
            negative_all_rank=loss.negative_all_rank,
        )
        built.momentum_dropout = model.momentum_dropout
        built.temperature_limits = (loss.temperature_min, loss.temperature_max)
        built.temp.data.fill_(loss.temperature)
        built.text_encoder.config.gradient_checkpointing = model.text_grad_ckpt
        return built

    def build_loader(self):
        if self.config.data.format == "msrvtt":
            raise ValueError(
                "data.format: MSR-VTT is retrieved zero-shot, there is no training on it: "
                "blipfast evaluate --config ... --checkpoint ..., with weights fine-tuned on pictures."
            )
        return super().build_loader()

    def check_evaluation(self) -> None:
        for split in ("val", "test"):
            if getattr(self.config.data, split):
                open_view(self.config, split)

    def alpha(self, step: int, steps_per_epoch: int) -> float:
        """Weight of the momentum targets: a linear ramp over `alpha_ramp_epochs` (official: the first epoch)."""
        return self.config.loss.alpha_at(step, steps_per_epoch)

    @classmethod
    def load_model(cls, config: Config, checkpoint: Path, device: torch.device) -> BLIP_ITM:
        """What evaluation needs: the trained half, without momentum encoders and queues."""
        videos = config.data.format == "msrvtt"
        matcher = VideoMatcher if videos else BLIP_ITM
        model = matcher(**model_settings(config), embed_dim=config.model.embed_dim)
        load_checkpoint(model, checkpoint, allow_missing=False)
        model = prepare(model, config.evaluate.precision, device)
        if videos:
            model.visual_encoder = Frames(model.visual_encoder)
        return model.eval()

    @classmethod
    @torch.no_grad()
    def evaluate_checkpoint(
        cls, config: Config, checkpoint: Path, split: str, output: Path, device: torch.device
    ) -> dict[str, float]:
        """Official figures (txt_r1 ... img_r_mean, r_mean) and, as itc_*, some of them without reranking.

        Of videos: vid_r1 ... and vid_mdR, the median rank of the right clip, for img_*. Writes
        retrieval.json, the `HITS` best of each query, and gallery.html into `output`.
        """
        view = open_view(config, split)
        model = cls.load_model(config, checkpoint, device)
        scores = score(model, view, config, device)
        img2txt = [view.img2txt[i] for i in range(len(view))]
        txt2img = [view.txt2img[t] for t in range(len(view.text))]
        metrics = retrieval_metrics(scores.i2t, scores.t2i, img2txt, txt2img)
        itc = retrieval_metrics(scores.similarity, scores.similarity.t(), img2txt, txt2img)
        if isinstance(view, VideoView):
            metrics = {name.replace("img_", "vid_"): value for name, value in metrics.items()}
            metrics["vid_mdR"] = float(ranks(scores.t2i, txt2img).double().quantile(0.5)) + 1
        metrics |= {f"itc_{name}": itc[name] for name in ("txt_r1", "img_r1", "r_mean")}
        if gather.rank() == 0:
            write_json(output / "retrieval.json", results(view, scores, img2txt, txt2img))
            if config.evaluate.gallery and isinstance(view, RetrievalView):
                pictures = open_retrieval(config.data, split=split)
                truths = [[view.text[t] for t in texts] for texts in img2txt]
                shown = gallery(config.evaluate.gallery, pictures, scores, [], truths, metrics)
                write_gallery(output / "gallery.html", shown)
        return metrics


def open_view(config: Config, split: str) -> RetrievalView | VideoView:
    """What data.val or data.test ("val", "test") holds, its pictures ready for the model.

    Raises FileNotFoundError or ValueError naming file, line and key.
    """
    data = config.data
    transform = eval_transform(config.model.image_size)
    source = data.val if split == "val" else data.test
    if not source:
        raise ValueError(f"data.{split} is empty: name the annotations to evaluate on.")
    if data.format == "msrvtt":
        return open_videos(data, source, transform, config.evaluate.frames, split)
    return open_retrieval(data, transform, split)


class VideoMatcher(BLIP_ITM):
    """BLIP_ITM whose pictures are clips [B, F, 3, S, S]: their states are all frames' tokens, [B, F * N, D_v]."""

    def image_features(self, image_embeds: Tensor) -> Tensor:
        """Normalised mean [B, E] of the frames' projections."""
        first = image_embeds.unflatten(1, (-1, self.visual_encoder.tokens))[:, :, 0]
        return F.normalize(self.vision_proj(first).mean(1), dim=-1)


class Frames(nn.Module):
    """An image encoder over the frames of clips [B, F, 3, S, S] -> [B, F * N, D_v]."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.tokens = encoder, encoder.pos_embed.shape[1]

    def forward(self, clips: Tensor) -> Tensor:
        return self.encoder(clips.flatten(0, 1)).unflatten(0, clips.shape[:2]).flatten(1, 2)


def score(model: BLIP_ITM, view: RetrievalView | VideoView, config: Config, device: torch.device) -> Scores:
    """Scores of all pictures (or clips) and texts of `view`, as config.evaluate says, shared over the ranks."""
    settings = config.evaluate
    size = (
        max(1, settings.batch_size // settings.frames) if isinstance(view, VideoView) else settings.batch_size
    )
    with ThreadPoolExecutor(max(1, config.data.workers)) as pool:  # decoders let go of Python's lock

        def load(indices: list[int]) -> Tensor:
            return torch.stack([picture for picture, _ in pool.map(view.__getitem__, indices)])

        collection = Collection(model, load, len(view), view.text, device, size, progress=True)
        return collection.rerank(settings.k_test, settings.score)


def results(view: Any, scores: Scores, img2txt: list, txt2img: list) -> dict[str, list[dict[str, Any]]]:
    """For each picture or clip the texts found, best first, and for each text the pictures; with the truth's rank."""
    names = view.video if isinstance(view, VideoView) else view.image

    def found(queries: list[str], table: Tensor, targets: list[str], truths: list) -> list[dict[str, Any]]:
        best = table.topk(min(HITS, table.shape[1]), 1)
        rows = zip(queries, best.indices.tolist(), best.values.tolist(), (ranks(table, truths) + 1).tolist())
        return [
            {
                "query": query,
                "rank": rank,
                "found": [[targets[i], score] for i, score in zip(indices, values) if score > UNSCORED],
            }
            for query, indices, values, rank in rows
        ]

    return {
        "image_to_text": found(names, scores.i2t, view.text, img2txt),
        "text_to_image": found(view.text, scores.t2i, names, txt2img),
    }
