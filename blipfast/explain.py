"""Which part of a picture a text is matched by: Grad-CAM over the attention of BLIP's ITM.

For the score s (the logit of "they match") and an attention map A [heads, texts' tokens, image tokens]

    heat = mean over heads of A * max(ds/dA, 0)

of the cross-attention in one layer of the text encoder gives a map of the picture for each token; of the
self-attention in one block of the image encoder, its class row gives one map for the whole text.
Source: Selvaraju et al. 2017 (Grad-CAM); ALBEF, Li et al. 2021, for cross-attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.data.images import composite
from blipfast.files import whole
from blipfast.models.blip_itm import BLIP_ITM

MAX_TOKENS = 35  # as ITM was trained
FORMATS = ".png .pdf .svg .svgz .eps .ps .jpg .jpeg .tif .tiff .webp".split()  # of figures


class Heat(NamedTuple):
    """Where a text finds itself in a picture. Maps are [rows, columns] of patches, float32 on the CPU, >= 0."""

    words: list[str]
    maps: Tensor  # [words, rows, columns]; empty for the image encoder's
    whole: Tensor  # of the whole text [rows, columns]: the mean over its tokens, [ENC] and [SEP] left out
    match: float  # ITM probability


def grad_cam(model: BLIP_ITM, image: Tensor, text: str, layer: int | None = None) -> Heat:
    """Heat of each word of `text` on `image` [3, S, S] or [1, 3, S, S], from the text encoder's cross-attention.

    layer: 0 is the first; None is a little past the middle (7 of 12). Not the last: ITM reads only [ENC] after it, so
    words have no gradient there. Of a word in several tokens, the mean. The text is cut at 35 tokens. Raises
    ValueError for a text without words or a layer that is not there. The model is left as it was.
    """
    blocks = model.text_encoder.encoder.layer
    last = len(blocks) - 1
    if last == 0:
        raise ValueError(
            "a text encoder of one layer has no heat of words; explain by an image block instead."
        )
    layer = chosen(layer, last, "text encoder", default=min(len(blocks) * 7 // 12, last - 1))
    attend = blocks[layer].crossattention.self
    ids, groups, words = tokens(model, text)

    def score():
        attend.save_attention = True
        return matching_logits(model, model.visual_encoder(image_batch(image)), ids)

    try:
        heat, match = heat_of(model, score, attend)
    finally:
        attend.save_attention = False
        forget(attend)
    maps = grid(heat[:, 1:])  # [tokens, rows, columns]: the class token's column is no place
    return Heat(
        words,
        torch.stack([maps[group].mean(0) for group in groups]),
        maps[1:-1].mean(0),
        match,
    )


def image_grad_cam(model: BLIP_ITM, image: Tensor, text: str, block: int | None = None) -> Heat:
    """Heat of the whole text on `image`, from the class token's attention in one block of the image encoder.

    block: 0 is the first; None the last. The rest is as in `grad_cam`; there are no maps of single words.
    """
    encoder = model.visual_encoder
    block = chosen(block, len(encoder.blocks), "image encoder", default=len(encoder.blocks) - 1)
    ids, _, _ = tokens(model, text)

    def score():
        return matching_logits(model, encoder(image_batch(image), register_blk=block), ids)

    try:
        heat, match = heat_of(model, score, encoder.blocks[block].attn)
    finally:
        forget(encoder.blocks[block].attn)
    whole = grid(heat[:1, 1:])
    return Heat([], whole[:0], whole[0], match)


def chosen(number: int | None, count: int, name: str, default: int) -> int:
    number = default if number is None else number
    if not 0 <= number < count:
        raise ValueError(f"layer {number}: of the {name}, layers 0 to {count - 1} can be explained.")
    return number


def image_batch(image: Tensor) -> Tensor:
    """[1, 3, S, S], asking for a gradient: the maps then have one even if the model is frozen."""
    image = image[None] if image.ndim == 3 else image
    if len(image) != 1:
        raise ValueError(f"one picture at a time, got {len(image)}.")
    return image.detach().requires_grad_()


def tokens(model: BLIP_ITM, text: str) -> tuple[list[int], list[list[int]], list[str]]:
    """Token ids of a text, the positions of each word's tokens, and the words."""
    encoding = model.tokenizer.backend.encode(text)
    ids = list(encoding.ids)
    if len(ids) > MAX_TOKENS:
        ids = ids[: MAX_TOKENS - 1] + ids[-1:]
    groups: dict[int, list[int]] = {}
    spans: dict[int, list[int]] = {}
    for position in range(1, len(ids) - 1):
        word = encoding.word_ids[position]
        groups.setdefault(word, []).append(position)
        spans.setdefault(word, []).extend(encoding.offsets[position])
    if not groups:
        raise ValueError("the text has no words to explain.")
    words = [text[min(span) : max(span)].strip() for span in spans.values()]
    return ids, list(groups.values()), words


def matching_logits(model: BLIP_ITM, image_embeds: Tensor, ids: list[int]) -> Tensor:
    """ITM logits [1, 2] by the encoder's plain path, which keeps attention maps."""
    text = torch.tensor([ids], device=image_embeds.device)
    if model.compat != "official":
        text[:, 0] = model.tokenizer.enc_token_id
    out = model.text_encoder(text, attention_mask=torch.ones_like(text), encoder_hidden_states=image_embeds)
    return model.itm_head(out.last_hidden_state[:, 0])


def heat_of(model: BLIP_ITM, score, attend) -> tuple[Tensor, float]:
    """Map times positive gradient, the mean over heads: [queries, keys], and the probability of a match."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.enable_grad():
            logits = score()
            weights = attend.get_attention_map()
            (gradient,) = torch.autograd.grad(logits[0, 1], weights)
    finally:
        for module in training:
            module.training = True
    heat = (weights * gradient.clamp_min(0)).detach()[0].float().mean(0).cpu()
    return heat, logits.detach().float().softmax(1)[0, 1].item()


def forget(attend) -> None:
    """Let go of the kept map: it holds the whole graph."""
    attend.attention_map = attend.attn_gradients = None


def grid(heat: Tensor) -> Tensor:
    """[..., patches] as [..., rows, columns]."""
    side = round(heat.shape[-1] ** 0.5)
    return heat.unflatten(-1, (side, side))


def draw(picture: Tensor, text: str, heat: Heat, output: str | Path) -> Path:
    """Write a figure: the picture (uint8 [3|4, H, W]), the heat of the whole text over it, and that of each word.

    The colour scale of the words is one, so that a word that finds nothing stays dark. The file appears whole or not
    at all; its ending says the format. Raises ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'blipfast[plot]'") from error
    panels = [("", None), ("whole text", heat.whole), *zip(heat.words, heat.maps)]
    output = figure_path(output)
    columns = min(len(panels), 5)
    rows = -(-len(panels) // columns)
    height, width = picture.shape[1:]
    pixels = composite(picture).permute(1, 2, 0).numpy()
    figure = Figure((2.2 * columns, 2.2 * rows * height / width + 0.35 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    brightest = float(heat.maps.max()) if len(heat.maps) else 0.0
    for ax in axes:
        ax.set_axis_off()
    for ax, (title, values) in zip(axes, panels):
        ax.set_title(title, fontsize=10, parse_math=False)
        ax.imshow(pixels)
        if values is not None:
            top = float(values.max()) if title == "whole text" else brightest
            ax.imshow(
                enlarged(values, (height, width)).numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=top or 1.0
            )
    figure.suptitle(f"{text}  (match {heat.match:.1%})", fontsize=11, parse_math=False)
    with whole(output) as unfinished:
        figure.savefig(unfinished, dpi=150, format=output.suffix[1:])
    return output


def figure_path(output: str | Path) -> Path:
    """ValueError if its ending names no format of figures."""
    output = Path(output)
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"{output}: a figure's name ends in one of {', '.join(FORMATS)}.")
    return output


def enlarged(heat: Tensor, size: tuple[int, int]) -> Tensor:
    """A map of patches as one of pixels (bicubic, not below 0)."""
    return F.interpolate(heat[None, None], size, mode="bicubic", align_corners=False)[0, 0].clamp_min(0)
