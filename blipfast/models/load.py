"""Models by path, ready to use: a run folder, a Hugging Face folder or name, a checkpoint of official size."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from blipfast.config import Config, config_from_dict, load_config
from blipfast.text import Tokenizer, init_tokenizer, load_tokenizer

from . import huggingface
from .blip import BLIP_Base, BLIP_Decoder
from .blip_itm import BLIP_ITM
from .blip_nlvr import BLIP_NLVR, twin_weights
from .blip_vqa import BLIP_VQA
from .checkpoint import kind_of, load_weights, read_state_dict
from .weights import locate

VITS = {
    "base": {"width": 768, "depth": 12, "heads": 12, "patch_size": 16},
    "large": {"width": 1024, "depth": 24, "heads": 16, "patch_size": 16},
}


class Described(NamedTuple):
    """A model on disk: how to build it, and its weights with official keys."""

    vit: Any  # "base", "large" or {width, depth, heads, patch_size}
    image_size: int
    med_config: Any
    embed_dim: int
    tokenizer: Tokenizer
    prompt: str
    vision_eps: float
    state: dict[str, Tensor]

    @property
    def settings(self) -> dict[str, Any]:
        """What every model's constructor takes."""
        return {name: getattr(self, name) for name in ("vit", "image_size", "med_config", "tokenizer")}


def settings_of(path: str | Path) -> Config:
    """The config of a run folder, what a Hugging Face folder made from one kept of it, else the defaults."""
    folder = locate(path)
    if (folder / "config.yaml").is_file():
        return load_config(folder / "config.yaml")
    if (folder / "config.json").is_file():
        return config_from_dict(huggingface.own_settings(folder), str(folder / "config.json"))
    return Config()


def load_captioner(
    path: str | Path, prompt: str | None = None, image_size: int | None = None
) -> BLIP_Decoder:
    """A captioner in eval mode; `prompt` and `image_size` override what `path` says.

    path: for all loaders here, a run folder, a Hugging Face folder or name, a .pth, .safetensors or URL of official
    size. ValueError if a weight would stay random.
    """
    model = describe(path, image_size)
    if kind_of(model.state) == "vqa":  # its tensors would fit, and its decoder would write nonsense
        raise ValueError(
            f"{path}: holds a VQA model, whose decoder answers questions; captioning needs another."
        )
    prompt = model.prompt if prompt is None else prompt
    return finished(BLIP_Decoder(prompt=prompt, **model.settings), model, path)


def load_matcher(path: str | Path, image_size: int | None = None, compat: str = "") -> BLIP_ITM:
    """An image-text matcher in eval mode. compat="official": [CLS] for ITM, as official BLIP_ITM and transformers."""
    model = describe(path, image_size)
    return finished(BLIP_ITM(embed_dim=model.embed_dim, compat=compat, **model.settings), model, path)


def load_vqa(path: str | Path, image_size: int | None = None, compat: str = "official") -> BLIP_VQA:
    """A model that answers questions, in eval mode."""
    model = describe(path, image_size)
    return finished(BLIP_VQA(compat=compat, **model.settings), model, path)


def load_nlvr(path: str | Path, image_size: int | None = None) -> BLIP_NLVR:
    """A model that judges a sentence about two pictures, in eval mode."""
    model = describe(path, image_size)
    return finished(BLIP_NLVR(**model.settings), model._replace(state=twin_weights(model.state)), path)


def load_features(path: str | Path, image_size: int | None = None) -> BLIP_Base:
    """A feature extractor in eval mode."""
    model = describe(path, image_size)
    return finished(BLIP_Base(**model.settings), model, path)


def finished(model: nn.Module, described: Described, path: str | Path) -> nn.Module:
    model.starts_random = ()  # for inference nothing may be
    load_weights(model, described.state, str(path), allow_missing=False)
    for module in model.visual_encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = described.vision_eps
    return model.eval()


def describe(path: str | Path, image_size: int | None = None) -> Described:
    """What `path` holds. ValueError for a checkpoint file of no official size: it does not say how many heads."""
    folder = locate(path)
    state = read_state_dict(folder)
    if (folder / "config.yaml").is_file():
        config = load_config(folder / "config.yaml")
        tokenizer = folder / "tokenizer.json"
        described = Described(
            config.model.vit,
            config.model.image_size,
            config.model.med_config,
            config.model.embed_dim,
            load_tokenizer(tokenizer) if tokenizer.exists() else init_tokenizer(),
            config.data.prompt,
            huggingface.OFFICIAL_EPS,
            state,
        )
    elif (folder / "config.json").is_file():
        theirs = huggingface.read_config(folder)
        names = [name for name, shape in VITS.items() if shape == theirs.vit]
        described = Described(
            names[0] if names else theirs.vit,
            theirs.image_size,
            theirs.med,
            theirs.embed_dim,
            huggingface.read_tokenizer(folder, theirs.vocab_size),
            huggingface.own_settings(folder).get("data", {}).get("prompt", huggingface.PROMPT),
            theirs.vision_eps,
            state,
        )
    else:
        embed_dim = len(state["vision_proj.weight"]) if "vision_proj.weight" in state else 256
        described = Described(
            vit_of(state, path),
            image_size_of(state),
            "med_config.json",
            embed_dim,
            init_tokenizer(),
            huggingface.PROMPT,
            huggingface.OFFICIAL_EPS,
            state,
        )
    return described._replace(image_size=image_size) if image_size else described


def vit_of(state: dict[str, Tensor], path: str | Path) -> str:
    width = state.get("visual_encoder.cls_token")
    names = {shape["width"]: name for name, shape in VITS.items()}
    if width is None or width.shape[-1] not in names:
        raise ValueError(
            f"{path}: no official BLIP checkpoint (visual_encoder.cls_token of width 768 or 1024). A model of another "
            "size is loaded from its run folder or Hugging Face folder, which say how many heads it has."
        )
    return names[width.shape[-1]]


def image_size_of(state: dict[str, Tensor]) -> int:
    patch = state["visual_encoder.patch_embed.proj.weight"].shape[-1]
    return round((state["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5) * patch
