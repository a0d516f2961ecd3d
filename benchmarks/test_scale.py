"""Cost per item from 1 to 100 times the work: it stays flat, and memory stays bounded. CSV and plot in results/.

A small model, so that 100 times the work is minutes: what is looked for is the slope, not the speed.
"""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.conftest import RESULTS, forget_peak, resident, versions, write
from blipfast.models.blip import blip_decoder
from blipfast.models.blip_itm import blip_itm
from blipfast.models.blip_vqa import blip_vqa
from blipfast.tasks.scoring import Collection

SIZE = dict(
    med_config=dict(
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=768,
        max_position_embeddings=64,
    ),
    vit=dict(width=192, depth=4, heads=3, patch_size=16),
    image_size=128,
)
SCALES = (1, 3, 10, 30, 100)
CAPTION = "a small brown dog on the beach"


@torch.no_grad()
def caption_images(n: int) -> int:
    """Captions of 8 n pictures, 8 places."""
    model = blip_decoder(**SIZE).eval()
    batches = (torch.randn(8, 3, 128, 128) for _ in range(n))
    return sum(1 for _ in model.generate_stream(batches, max_length=16, min_length=5, batch_size=8))


@torch.no_grad()
def rerank_images(n: int) -> int:
    """5 n pictures, each against its 32 nearest texts."""
    model = blip_itm(**SIZE).eval()
    texts = [f"{CAPTION} {i}" for i in range(64)]
    collection = Collection(
        model, lambda i: torch.randn(len(i), 3, 128, 128), 5 * n, texts, "cpu", memory=1e6
    )
    wanted = {image: list(range(32)) for image in range(5 * n)}
    return sum(map(len, collection.match(wanted).values()))


@torch.no_grad()
def rerank_texts(n: int) -> int:
    """10 pictures against 20 n texts each."""
    model = blip_itm(**SIZE).eval()
    texts = [f"{CAPTION} {i}" for i in range(20 * n)]
    collection = Collection(model, lambda i: torch.randn(len(i), 3, 128, 128), 10, texts, "cpu")
    return sum(map(len, collection.match({image: list(range(20 * n)) for image in range(10)}).values()))


@torch.no_grad()
def retrieve(n: int) -> int:
    """10 n pictures and 50 n texts: ITC of all pairs, ITM of the 8 nearest both ways."""
    model = blip_itm(**SIZE).eval()
    texts = [f"{CAPTION} {i}" for i in range(50 * n)]
    Collection(model, lambda i: torch.randn(len(i), 3, 128, 128), 10 * n, texts, "cpu").rerank(8)
    return 10 * n


@torch.no_grad()
def rank_answers(n: int) -> int:
    """One question, 128 n candidate answers of one to three words that seldom begin alike."""
    model = blip_vqa(**SIZE).eval()
    words = [
        word for word in map(model.tokenizer.decode, [[i] for i in range(2000, 20000)]) if word.isalpha()
    ]
    chosen = torch.randint(len(words), (128 * n, 3), generator=torch.Generator().manual_seed(0)).tolist()
    answers = [" ".join(words[j] for j in row[: 1 + i % 3]) for i, row in enumerate(chosen)]
    how = dict(train=False, inference="rank", k_test=len(answers))
    model(torch.randn(1, 3, 128, 128), ["what"], answers, **how)
    return len(answers)


WORK = {f.__name__: f for f in (caption_images, rerank_images, rerank_texts, retrieve, rank_answers)}


@pytest.mark.parametrize("name", WORK)
def test_cost_per_item_stays_flat(name, benchmark, capsys):
    rows = []

    def every_scale() -> None:
        WORK[name](1)  # a warm-up
        for n in SCALES:
            forget_peak()
            start = time.perf_counter()
            items = WORK[name](n)
            seconds = time.perf_counter() - start
            peak = resident("VmHWM")
            rows.append([n, items, seconds / items * 1e3, peak])

    benchmark.pedantic(every_scale, rounds=1)
    with capsys.disabled():
        print("\n  times the work, items, ms an item, peak MiB of the process:")
        for row in rows:
            print("  " + "  ".join(f"{value:10.4g}" for value in row))
    head = ["scale", "items", "ms_per_item", "peak_mib", *versions()]
    write(f"scale_{name}", head, [[*(f"{v:.4g}" for v in row), *versions().values()] for row in rows])
    plot(name, rows)
    assert rows[-1][2] <= 1.5 * rows[1][2]


def plot(name: str, rows: list[list[float]]) -> None:
    """results/scale_NAME.png: milliseconds an item over the number of items."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(5, 3), layout="constrained")
    axes.plot([row[1] for row in rows], [row[2] for row in rows], "o-")
    axes.set(xscale="log", xlabel="items", ylabel="ms an item", title=name.replace("_", " "))
    axes.set_ylim(0)
    figure.savefig(RESULTS / f"scale_{name}.png", dpi=120)
    pyplot.close(figure)
