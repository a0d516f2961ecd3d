"""Run folders of small models whose outputs differ from input to input."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from blipfast.config import Config, save_config
from blipfast.models.checkpoint import save_weights

from .conftest import BERT, VIT

TEXTS = ["a dog on the beach", "two red apples, one green!", "cat"]


def scramble(model: nn.Module, seed: int) -> nn.Module:
    """Weights so large that attention and predictions are far from uniform, and sentences come to an end."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter += 1
            if name.endswith("predictions.bias"):
                parameter[102] += 4
    return model.eval()


def write_run(folder: Path, model: nn.Module, **settings) -> Path:
    """A run folder that holds `model`."""
    folder.mkdir()
    config = Config()
    config.model.vit, config.model.image_size, config.model.embed_dim = dict(VIT), 32, 8
    config.model.med_config = dict(BERT)
    config.data.prompt = "a picture of "
    for name, value in settings.items():
        setattr(config.model, name, value)
    save_config(config, folder / "config.yaml")
    model.tokenizer.save(folder / "tokenizer.json")
    save_weights(model.state_dict(), folder / "model.safetensors")
    return folder
