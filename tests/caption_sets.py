"""Tiny captioning sets in the official schemas, pictures included, and the config of a captioner of milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

from blipfast.text import train_tokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
SHAPES = ("square", "circle")
THINGS = [(colour, shape) for shape in SHAPES for colour in COLOURS]

CONFIG = """
task: caption
output: {output}
model:
  vit: {{width: 32, depth: 2, heads: 4, patch_size: 8}}
  image_size: 32
  med_config: {{hidden_size: 48, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 96,
               max_position_embeddings: 32, initializer_range: 0.1, hidden_dropout_prob: 0.0,
               attention_probs_dropout_prob: 0.0}}
  tokenizer: {folder}/tokenizer.json
data:
  format: coco
  train: [{folder}/annotations]
  val: {folder}/annotations
  test: {folder}/annotations
  image_root: {folder}/images
  prompt: "a picture of "
  min_scale: 0.9
  randaugment: none
  workers: 0
train: {{epochs: 2, batch_size: 4, lr: 3e-3, schedule: warmup_cosine, warmup_steps: 2, min_lr: 0, log_every: 5,
        evaluate_every: 1}}
evaluate: {{batch_size: 2, num_beams: 2, max_length: 20, min_length: 5, gallery: 2}}
"""


def draw(path: Path, colour: str, shape: str, size: int = 40) -> None:
    """A picture of one thing on white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (size, size), "white")
    paint = ImageDraw.Draw(picture)
    (paint.rectangle if shape == "square" else paint.ellipse)(
        (6, 6, size - 6, size - 6), fill=COLOURS[colour]
    )
    picture.save(path)


def caption(colour: str, shape: str) -> str:
    return f"A {colour} {shape} on a white table."


def coco(folder: Path, tests: int = 7) -> Path:
    """COCO in Karpathy's split: 8 things to train on with two captions each, `tests` in val and as many in test."""
    train, number = [], 0
    for colour, shape in THINGS:
        number += 1
        name = f"train2014/COCO_train2014_{number:012d}.jpg"
        draw(folder / "images" / name, colour, shape)
        for text in (caption(colour, shape), f"there is a {colour} {shape}."):
            train.append({"image": name, "caption": text, "image_id": f"coco_{number}"})
    write(folder / "annotations" / "coco_karpathy_train.json", train)
    for split in ("val", "test"):
        entries = []
        for colour, shape in THINGS[:tests]:
            number += 1
            name = f"val2014/COCO_val2014_{number:012d}.jpg"
            draw(folder / "images" / name, colour, shape, size=48)
            entries.append(
                {"image": name, "caption": [caption(colour, shape), f"There's a {colour} {shape}"]}
            )
        write(folder / "annotations" / f"coco_karpathy_{split}.json", entries)
    texts = [f"a picture of {entry['caption']}" for entry in train]
    train_tokenizer(texts, 330).save(folder / "tokenizer.json")
    return folder


def nocaps(folder: Path) -> Path:
    """NoCaps: official BLIP's two lists, and the benchmark's own file for val with captions and domains."""
    domains = ("in-domain", "near-domain", "out-domain")
    own = {"images": [], "annotations": []}
    for split in ("val", "test"):
        entries = []
        for number, (colour, shape) in enumerate(THINGS[:5]):
            name = f"{number:016x}.jpg"
            draw(folder / "nocaps" / split / name, colour, shape)
            entries.append({"image": f"{split}/{name}", "img_id": number})
            if split == "val":
                own["images"].append({"id": number, "file_name": name, "domain": domains[number % 3]})
                own["annotations"] += [
                    {"image_id": number, "id": 2 * number + i, "caption": text}
                    for i, text in enumerate((caption(colour, shape), f"one {shape}"))
                ]
        write(folder / "annotations" / f"nocaps_{split}.json", entries)
    write(folder / "annotations" / "nocaps_val_captions.json", own)
    return folder


def config(folder: Path, output: Path) -> Path:
    """Write the config of a run on the set in `folder`."""
    path = folder / "caption.yaml"
    path.write_text(CONFIG.format(folder=folder, output=output))
    return path


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
