"""What "each thing once" is worth on this machine: BLIP-base against reference.py and against transformers.

Random weights: times do not depend on them. Captions have 14 tokens; where official BLIP pads (30 or 35 tokens), so
does the reference. Ratios are of contenders that take turns in one process, all threads of the machine.
"""

from __future__ import annotations

import gc
import multiprocessing
from statistics import median

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import forget_peak, resident, versions, write
from benchmarks.contenders import Models
from benchmarks.models.caption import BEAMS, by_transformers
from benchmarks.models.pretrain import step_of
from benchmarks.models.retrieval import rerankers
from benchmarks.models.vqa import rankers
from blipfast.models.blip import blip_decoder
from blipfast.models.generation import generate
from blipfast.quantize import prepare

ROUNDS = 3


def in_our_words(contenders: dict) -> dict:
    """As the results name them, the reference first: what the others are compared with."""
    return {"reference": contenders["reference"], "blipfast": contenders["ours"]}


def test_reranking_128_texts_an_image(contest):
    contenders = in_our_words(rerankers(Models("cpu", 384), 1, 128))
    ratios = contest("rerank_128_texts_384", contenders, per=128, rounds=ROUNDS)
    assert ratios["blipfast"] >= 8


@torch.no_grad()
def test_captioning_with_3_beams(contest):
    """4 pictures at a time, all captions of 20 tokens with the prompt."""
    pytest.importorskip("transformers")
    models = Models("cpu", 384)
    image, ours = models.pictures(4), models.ours(blip_decoder)
    low, low8 = (prepare(blip_decoder(image_size=384), precision, "cpu") for precision in ("bf16", "int8"))
    theirs = by_transformers(models.transformers(), [image])
    assert theirs()[0].shape[1] == 20
    ratios = contest(
        "caption_3_beams_384",
        {
            "transformers fp32": theirs,
            "blipfast fp32": lambda: ours.generate(image, **BEAMS),
            "blipfast bf16": lambda: low.generate(image, **BEAMS),
            "blipfast int8": lambda: low8.generate(image, **BEAMS),
        },
        per=4,
        rounds=ROUNDS,
    )
    assert ratios["blipfast fp32"] >= 1.5 and ratios["blipfast bf16"] >= 2.5


@torch.no_grad()
def test_decoding_alone(contest):
    """The same without the image encoder."""
    pytest.importorskip("transformers")
    models = Models("cpu", 384)
    states, ours, other = models.states(4), models.ours(blip_decoder), models.transformers()
    low, low8 = (prepare(blip_decoder(image_size=384), precision, "cpu") for precision in ("bf16", "int8"))
    prompt = ours.prompt_ids("cpu")
    rules = BEAMS | {"eos_token_id": 102, "pad_token_id": 0}

    def decode(model) -> Tensor:
        dtype = model.visual_encoder.pos_embed.dtype
        return generate(model.text_decoder, prompt, states.to(dtype), **rules)

    ratios = contest(
        "decode_3_beams_384",
        {
            "transformers fp32": lambda: other.text_decoder.generate(
                input_ids=prompt.expand(4, -1),
                attention_mask=torch.ones(4, len(prompt), dtype=torch.long),
                encoder_hidden_states=states,
                encoder_attention_mask=torch.ones(4, 577, dtype=torch.long),
                eos_token_id=102,
                pad_token_id=0,
                **BEAMS,
            ),
            "blipfast fp32": lambda: decode(ours),
            "blipfast bf16": lambda: decode(low),
            "blipfast int8": lambda: decode(low8),
        },
        per=4,
        rounds=ROUNDS,
    )
    assert ratios["blipfast fp32"] >= 1.5


def test_vqa_ranking_of_128_answers(contest):
    contenders = in_our_words(rankers(Models("cpu", 480), 1))
    ratios = contest("vqa_rank_128_480", contenders, per=1, rounds=ROUNDS)
    assert ratios["blipfast"] >= 1.8


BATCH = 4


def test_pretraining_step(contest):
    models = Models("cpu", 224)
    steps = {which: step_of(which, models, BATCH) for which in ("reference", "ours")}
    low = {"blipfast bf16": step_of("ours", models, BATCH, bf16=True)}
    ratios = contest("pretrain_step_224", in_our_words(steps) | low, per=BATCH, rounds=ROUNDS)
    assert ratios["blipfast"] >= 1.5


# With AdamW's state, 8 pairs a step are what the reference fits into a machine of 8 GB; 4 are there for the slope.
BATCHES = (4, 8)


def peak(which: str, batch: int) -> float:
    """MiB by which a step raises a fresh process's memory above the model's; gradients are part of it."""
    step = step_of("ours" if which == "blipfast" else which, Models("cpu", 224), batch)
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def test_peak_memory_of_a_pretraining_step(benchmark, capsys):
    """Peaks in MiB, and the line through both batches: what a pair adds, and what is left for none.

    The latter is mostly gradients, 963 MiB; less where the peak comes before all of them are made.
    """
    used = {(which, batch): [] for batch in BATCHES for which in ("reference", "blipfast")}

    def one_round() -> None:
        for case, peaks in used.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks.append(pool.apply(peak, case))

    benchmark.pedantic(one_round, rounds=ROUNDS)
    few, many = BATCHES
    rows, ratios = [], {}
    for batch in BATCHES:
        found = sorted(b / a for a, b in zip(used["reference", batch], used["blipfast", batch], strict=True))
        ratios[batch] = median(found)
        for which in ("reference", "blipfast"):
            peaks = [median(used[which, size]) for size in BATCHES]
            each = (peaks[1] - peaks[0]) / (many - few)
            share = found if which == "blipfast" else [1.0]
            figures = (
                median(used[which, batch]),
                each,
                peaks[0] - few * each,
                median(share),
                share[0],
                share[-1],
            )
            rows.append([which, batch, *(f"{value:.4g}" for value in figures), *versions().values()])
            with capsys.disabled():
                print(f"\n  {which:10s} {batch} pairs: {figures[0]:.0f} MiB above the model", end="")
                print(f", {each:.0f} a pair and {figures[2]:.0f} fixed; ratio {figures[3]:.2f}", end="")
    names = ["peak_mib", "mib_per_pair", "mib_fixed", "ratio_p50", "ratio_min", "ratio_max"]
    write("pretrain_memory_224", ["contender", "pairs", *names, *versions()], rows)
    benchmark.extra_info.update({f"ratio {batch}": round(ratio, 2) for batch, ratio in ratios.items()})
    assert ratios[many] <= 0.65
