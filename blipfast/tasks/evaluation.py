"""What a pre-trained model can do on pictures it has never seen: retrieval both ways, ITM, captions, a gallery."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from blipfast.config import Config
from blipfast.data.transforms import eval_transform
from blipfast.data.views import RetrievalView
from blipfast.metrics import retrieval_metrics
from blipfast.models import gather
from blipfast.models.load import load_captioner, load_matcher
from blipfast.quantize import prepare

from .captioning import captions_of
from .gallery import gallery, write_gallery
from .scoring import Collection, chunks
from .sharing import my_share


@torch.no_grad()
def evaluate(
    config: Config, test: RetrievalView, model: Path, output: Path, device: torch.device
) -> dict[str, float]:
    """Figures of a pre-trained model (a run folder or a checkpoint) on a view, and output/gallery.html, by all ranks.

    Retrieval recall (official names, per cent) after ITM reranking and, as itc_*, before; ITM accuracy on hard pairs
    beside its prior; per cent of captions equal to a true one. In evaluate.precision, whatever the run trains in.
    """
    with torch.autocast(device.type, enabled=False):
        return _evaluate(config, test, model, output, device)


def _evaluate(
    config: Config, test: RetrievalView, model: Path, output: Path, device: torch.device
) -> dict[str, float]:
    start, settings = time.time(), config.evaluate
    matcher = prepare(load_matcher(model), settings.precision, device)
    transform = eval_transform(matcher.visual_encoder.image_size)

    def load(indices: list[int]) -> Tensor:
        return torch.stack([transform(test[i][0]) for i in indices])

    collection = Collection(matcher, load, len(test), test.text, device, settings.batch_size, progress=True)
    img2txt = [test.img2txt[i] for i in range(len(test))]
    txt2img = [test.txt2img[i] for i in range(len(test.text))]
    scores = collection.rerank(settings.k_test, settings.score)
    metrics = retrieval_metrics(scores.i2t, scores.t2i, img2txt, txt2img)
    itc = retrieval_metrics(scores.similarity, scores.similarity.t(), img2txt, txt2img)
    metrics |= {f"itc_{name}": value for name, value in itc.items()}
    metrics |= {"itm_accuracy": 100 * collection.itm_accuracy(img2txt), "itm_prior": 200 / 3}

    captioner = prepare(load_captioner(model, prompt=settings.prompt or None), settings.precision, device)
    share = list(my_share(len(test)))
    batches = (load(indices).to(device) for indices in chunks(share, settings.batch_size))
    captions = captions_of(captioner, batches, share, len(test), settings)
    truths = [[test.text[t] for t in texts] for texts in img2txt]
    exact = sum(caption in truth for caption, truth in zip(captions, truths, strict=True))
    metrics |= {"caption_exact": 100 * exact / len(test), "images": len(test), "texts": len(test.text)}
    metrics["evaluation_seconds"] = time.time() - start
    shown = {name: value for name, value in metrics.items() if not name.startswith("itc_")}
    if gather.rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
        page = gallery(settings.gallery, test, scores, captions, truths, shown)
        write_gallery(output / "gallery.html", page)
    return metrics
