"""What a pre-trained model can do on pictures it has never seen: retrieval both ways, ITM, captions, a gallery."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from blipfast.config import Config
from blipfast.data.karpathy import RetrievalView
from blipfast.data.transforms import eval_transform
from blipfast.metrics import ranks, retrieval_metrics
from blipfast.models import gather
from blipfast.models.run import load_captioner, load_matcher
from blipfast.quantize import prepare

from .captioning import captions_of
from .report import Caption, Gallery, Hit, ImageQuery, TextQuery, sample, write_gallery
from .scoring import Collection, Scores, chunks
from .sharing import my_share

HITS = 5  # shown for each query in the gallery


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


def gallery(
    count: int,
    test: RetrievalView,
    scores: Scores,
    captions: list[str],
    truths: list[list[str]],
    metrics: dict[str, float],
) -> Gallery:
    """A fixed random sample of `count` pictures and of as many texts, right and wrong as they come.

    captions: what was written about each picture; [] if nothing was.
    """
    img2txt = [test.img2txt[i] for i in range(len(test))]
    txt2img = [
        [found] if isinstance(found, int) else list(found)
        for found in map(test.txt2img.get, range(len(test.text)))
    ]
    image_ranks, text_ranks = ranks(scores.i2t, img2txt), ranks(scores.t2i, txt2img)

    def hits(row: Tensor, truth: list[int], pictures: bool) -> list[Hit]:
        best = row.topk(min(HITS, len(row)))
        return [
            Hit(
                truths[i][0] if pictures else test.text[i],
                score,
                i in truth,
                test[i][0] if pictures else None,
            )
            for score, i in zip(best.values.tolist(), best.indices.tolist())
        ]

    chosen = sample(len(test), count)
    return Gallery(
        "blipfast on pictures it has never seen",
        metrics,
        text_to_image=[
            TextQuery(
                test.text[t],
                hits(scores.t2i[t], txt2img[t], pictures=True),
                int(text_ranks[t]) + 1,
                test[txt2img[t][0]][0],
            )
            for t in sample(len(test.text), count, seed=1)
        ],
        image_to_text=[
            ImageQuery(
                test[i][0], truths[i][0], hits(scores.i2t[i], img2txt[i], False), int(image_ranks[i]) + 1
            )
            for i in chosen
        ],
        captions=[Caption(test[i][0], captions[i], truths[i]) for i in chosen if captions],
    )
