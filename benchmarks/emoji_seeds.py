"""The demo over several seeds, and a table of what they reached: `make seeds`.

Each run is the demo's own command with another seed. Beside it stands what plain pixels reach without learning: the
name of the training picture that looks most alike, both laid over white and shrunk to 24 x 24.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from blipfast.config import load_config
from blipfast.data.pairs import PairsDataset
from blipfast.data.transforms import eval_transform
from blipfast.data.views import RetrievalView
from blipfast.metrics import recall

CONFIG = "configs/emoji.yaml"
FIGURES = (
    "txt_r1 txt_r5 txt_r10 img_r1 img_r5 img_r10 itc_txt_r1 itc_img_r1 itm_accuracy itm_prior caption_exact seconds"
).split()


def run(seed: int, output: Path) -> dict[str, float]:
    """Train with one seed under the deepspeed launcher; returns its metrics."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [sys.executable, str(launcher), "--quiet", "blipfast/train.py", "--config", CONFIG]
    environment = dict(os.environ) if torch.cuda.is_available() else os.environ | {"DS_ACCELERATOR": "cpu"}
    subprocess.run([*command, "--set", f"seed={seed}", f"output={output}"], check=True, env=environment)
    return json.loads((output / "metrics.json").read_text())


def pixel_recall() -> list[float]:
    """Recall@1, 5, 10 (per cent) of picture to text by the cosine to the nearest training picture of each name."""
    data = load_config(CONFIG).data
    shrink = eval_transform(24)
    train = PairsDataset(data.train)
    test = RetrievalView(data.test)
    names = {text: t for t, text in enumerate(test.text)}
    rows = [i for i in range(len(train)) if train.caption(i) in names]
    known = F.normalize(torch.stack([shrink(train[i]["image"]).flatten() for i in rows]), dim=1)
    asked = F.normalize(torch.stack([shrink(test[i][0]).flatten() for i in range(len(test))]), dim=1)
    columns = torch.tensor([names[train.caption(i)] for i in rows]).expand(len(asked), -1)
    scores = torch.full((len(asked), len(names)), -1.0).scatter_reduce(1, columns, asked @ known.t(), "amax")
    return recall(scores, [test.img2txt[i] for i in range(len(test))])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("runs/emoji_seeds"))
    args = parser.parse_args()
    results = [run(seed, args.output / str(seed)) for seed in args.seeds]
    lines = ["| figure | mean | lowest | highest |", "|---|---|---|---|"]
    for name in FIGURES:
        values = [result[name] for result in results]
        lines.append(f"| {name} | {sum(values) / len(values):.1f} | {min(values):.1f} | {max(values):.1f} |")
    pixels = " / ".join(f"{value:.1f}" for value in pixel_recall())
    table = "\n".join(lines) + f"\n\nNearest picture by pixels, picture to text, recall@1/5/10: {pixels}\n"
    (args.output / "summary.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
