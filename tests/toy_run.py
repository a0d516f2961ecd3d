"""A small task for the training loop, run like train.py: `deepspeed tests/toy_run.py --config tests/data/toy.yaml`.

It has what makes BLIP hard to train in shards: tied weights, momentum pairs, a queue, a clamped scalar, dropout, a
frozen part, a parameter that no loss reaches, and parameters of odd sizes (which do not divide by two ranks).
Arguments are train.py's; `--then` begins those of a further run in the same processes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from blipfast.config import load_config
from blipfast.models.gather import concat_all_gather
from blipfast.train import main
from blipfast.training import distributed, loop
from tests.launch import TOY_CONFIG

WORDS, WIDTH, QUEUE = 37, 15, 12


class ToyModel(nn.Module):
    momentum = 0.9

    def __init__(self, dropout: float, width: int = WIDTH):
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.blocks = nn.Sequential(
            nn.Linear(width, 41), nn.GELU(), nn.Dropout(dropout), nn.Linear(41, width)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, WORDS)
        self.head.weight = self.embed.weight  # tied, as BLIP's decoder
        self.unused = nn.Linear(3, 1)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.blocks_m = nn.Sequential(nn.Linear(width, 41), nn.GELU(), nn.Linear(41, width)).requires_grad_(
            False
        )
        self.temp = nn.Parameter(torch.tensor(0.07))
        for (_, average), (_, online) in zip(
            self.blocks_m.named_parameters(), self.blocks.named_parameters()
        ):
            average.data.copy_(online.data)
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("queue", torch.randn(QUEUE, width, generator=generator))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.keys: list[torch.Tensor] = []

    def momentum_pairs(self):
        return list(zip(self.blocks.parameters(), self.blocks_m.parameters()))

    def clamped(self):
        return [(self.temp, 0.068, 0.0705)]

    def forward(self, batch, *, alpha):
        x = self.embed(batch["index"] % WORDS)
        features = self.norm(self.blocks(x) + self.frozen(x))
        with torch.no_grad():
            key = self.norm(self.blocks_m(x))
            self.keys.append(key)
        logits = features @ torch.cat([key, self.queue.to(key.dtype)]).T * 0.1 / self.temp
        contrast = nn.functional.cross_entropy(logits.float(), torch.arange(len(x), device=x.device))
        words = nn.functional.cross_entropy(self.head(features).float(), (batch["index"] * 7 + 1) % WORDS)
        loss = contrast + words
        if os.environ.get("TOY_NAN_AT") and (batch["index"] == int(os.environ["TOY_NAN_AT"])).any():
            loss = loss * float("nan")
        if os.environ.get("TOY_INFINITE_GRADIENT"):
            loss = loss + (self.temp - self.temp.detach()).abs().sqrt()  # 0, but its slope is not finite
        return {
            "loss": loss,
            "loss_words": words.detach(),
            "temperature": self.temp.detach().float().clone(),
            "alpha_in": loss.new_tensor(alpha),
        }

    @torch.no_grad()
    def end_step(self):
        # the micro-batches of one step in global order: micro-batch m of rank r is number m * ranks + r
        for key in self.keys:
            for row in concat_all_gather(key.float()):
                self.queue[self.pointer.item()] = row
                self.pointer[0] = (self.pointer[0] + 1) % QUEUE
        self.keys.clear()


class ToyLoader:
    """The order contract of TrainLoader over numbers."""

    def __init__(self, size, batch, seed, rank, ranks, accumulation):
        self.size, self.batch, self.seed, self.rank, self.ranks, self.accumulation = (
            size,
            batch,
            seed,
            rank,
            ranks,
            accumulation,
        )

    def __len__(self):
        return self.size // (self.batch * self.ranks * self.accumulation)

    def iterate(self, epoch, start_step=0):
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed * 1000 + epoch))
        micros = order[: len(self) * self.batch * self.ranks * self.accumulation].reshape(-1, self.batch)
        for step in range(start_step, len(self)):
            time.sleep(float(os.environ.get("TOY_SLEEP", 0)))
            for micro in range(self.accumulation):
                yield {
                    "index": micros[(step * self.accumulation + micro) * self.ranks + self.rank],
                    "caption": ["a"] * self.batch,
                }


class ToyTask:
    def __init__(self, config, rank, world_size):
        train = config.train
        self.output, self.rank = Path(config.output), rank
        self.model = ToyModel(config.model.momentum, int(os.environ.get("TOY_WIDTH", WIDTH)))
        self.loader = ToyLoader(101, train.batch_size, config.seed, rank, world_size, train.accumulation)

    def alpha(self, step, steps_per_epoch):
        return min(1.0, step / (2 * steps_per_epoch))

    def evaluate(self, model, epoch):
        assert not model.training and model.embed.weight.shape[0] == WORDS, (
            "the whole model, in evaluation mode"
        )
        index = torch.arange(4 + self.rank)  # ranks may do different work here
        total = model.head(model.norm(model.blocks(model.embed(index)))).double().abs().sum()
        assert model.head.weight is model.embed.weight
        whole = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
        return {"whole": whole, "finite": float(total.isfinite())}

    def finish(self, model, metrics):
        if self.rank == 0:
            (self.output / "metrics.json").write_text(json.dumps(metrics))


def run_all(arguments, build=None):
    """Several runs of train.py in one process group; `--then` begins the arguments of the next."""
    runs = [[]]
    for argument in arguments:
        if argument == "--then":
            runs.append([])
        else:
            runs[-1].append(argument)
    local_rank = [a for a in runs[0] if a.startswith("--local_rank")]
    if len(runs) > 1:
        distributed.connect()
    try:
        return max(main([*run, *local_rank], build=build) for run in runs)
    finally:
        distributed.disconnect()  # or gloo's threads may abort the process at its end


def toy_config(output, *settings):
    """Six steps, a checkpoint every two."""
    usual = [f"output={output}", "train.max_steps=6", "train.save_every=2"]
    return load_config(TOY_CONFIG, [*usual, *settings])


def train(output, *settings, build=ToyTask, **options):
    """Run it in this process."""
    return loop.run(toy_config(output, *settings), build, **options)


if __name__ == "__main__":
    sys.exit(run_all(sys.argv[1:], ToyTask))
