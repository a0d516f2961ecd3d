"""Models by path, ready to use: a run folder of ours, or an official checkpoint whose size tells its shape."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from blipfast.config import load_config
from blipfast.text import init_tokenizer, load_tokenizer

from .blip import BLIP_Decoder
from .blip_itm import BLIP_ITM
from .checkpoint import load_weights, read_state_dict, save_weights


def load_captioner(
    path: str | Path, prompt: str | None = None, image_size: int | None = None
) -> BLIP_Decoder:
    """A captioner in eval mode from a run folder, `.pth` or `.safetensors`; `prompt` and `image_size` override."""
    settings, state = describe(path, image_size)
    if prompt is None:
        prompt = settings.pop("prompt", "a picture of ")
    settings.pop("prompt", None)
    settings.pop("embed_dim")
    return finished(BLIP_Decoder(prompt=prompt, **settings), state, path)


def load_matcher(path: str | Path, image_size: int | None = None) -> BLIP_ITM:
    """An image-text matcher in eval mode from a run folder, `.pth` or `.safetensors`."""
    settings, state = describe(path, image_size)
    settings.pop("prompt", None)
    return finished(BLIP_ITM(**settings), state, path)


def finished(model: nn.Module, state, path) -> nn.Module:
    load_weights(model, state, str(path), allow_missing=False)
    return model.eval()


def describe(path: str | Path, image_size: int | None) -> tuple[dict, dict]:
    """Constructor settings of the model in `path`, and its weights."""
    path = Path(path)
    state = read_state_dict(path)
    if path.is_dir():
        config = load_config(path / "config.yaml")
        tokenizer = path / "tokenizer.json"
        settings = dict(
            vit=config.model.vit,
            image_size=config.model.image_size,
            med_config=config.model.med_config,
            embed_dim=config.model.embed_dim,
            tokenizer=load_tokenizer(str(tokenizer)) if tokenizer.exists() else init_tokenizer(),
            prompt=config.data.prompt,
        )
    else:
        settings = dict(
            vit=vit_of(state, path), image_size=image_size_of(state, path), med_config="med_config.json"
        )
        settings["embed_dim"] = len(state["vision_proj.weight"]) if "vision_proj.weight" in state else 256
    if image_size:
        settings["image_size"] = image_size
    return settings, state


def vit_of(state: dict, path: Path) -> str:
    width = state.get("visual_encoder.cls_token")
    sizes = {768: "base", 1024: "large"}
    if width is None or width.shape[-1] not in sizes:
        raise ValueError(
            f"{path}: no official BLIP checkpoint (visual_encoder.cls_token of width 768 or 1024)."
        )
    return sizes[width.shape[-1]]


def image_size_of(state: dict, path: Path) -> int:
    patch = state["visual_encoder.patch_embed.proj.weight"].shape[-1]
    return round((state["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5) * patch


def export(run: str | Path, output: str | Path) -> Path:
    """Write the weights of a run (or of any checkpoint) as official-style `.pth` or as `.safetensors`."""
    if Path(output).suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{output}: the ending says the format; use .pth or .safetensors.")
    return save_weights(read_state_dict(run), output)
