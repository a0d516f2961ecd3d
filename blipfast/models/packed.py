"""MED over packed texts: the same weights and results as `med.BertModel.forward`, each thing computed once.

No padding; the image's keys and values of all layers from one matrix product, shared by every text that looks at it;
of the last layer only the rows that are read. Texts that go through different self-attentions but share everything
else (ITM and LM in pre-training) go through in one pass, as `Part`s.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blipfast.backends import recompute_contexts
from blipfast.ops.attention import Layout, apart, attention, attention_varlen
from blipfast.ops.launch import autocast_dtype
from blipfast.ops.linear import is_plain, linear
from blipfast.ops.linear_cross_entropy import linear_cross_entropy
from blipfast.ops.seeds import drawn_together

from .cast_weights import cast_weights
from .med import BertEncoder, BertLMHeadModel, BertModel, BertSelfAttention
from .packing import Ragged, Rows, cross_attention, in_blocks, reads, stackable, stacked


@dataclass
class ImageStates:
    """What cross-attention reads: every layer's keys and values, of M images of N tokens.

    layers: (keys, values), each [M, N, H, d], or (both,) in one tensor [M, N, 2, H, d]; see `ops.attention.apart`.
    mask: bool [M, N], True where a token counts; None: all do.
    """

    layers: Sequence[tuple[Tensor, ...]]
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.layers[0][0])

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        return tuple(self.layers[0][0].shape[:2])


def image_states(
    encoder: BertEncoder, image_embeds: Tensor, mask: Tensor | None = None, name: str = "self"
) -> ImageStates:
    """Keys and values of images [M, N, D_v] for all layers; in training a layer's are made when it is read.

    mask [M, N]: nonzero where an image token counts. name: which attention of a cross-attention block ("self"; with two
    images "self0" and "self1").
    """
    blocks = [getattr(layer.crossattention, name) for layer in encoder.layer]
    image_embeds = in_dtype_of(blocks[0].key, image_embeds)
    mask = None if mask is None else mask.bool()
    if torch.is_grad_enabled():
        return ImageStates(KeysWhenRead(blocks, image_embeds), mask)
    return ImageStates(project(blocks, image_embeds), mask)


def in_dtype_of(layer: nn.Module, states: Tensor) -> Tensor:
    """States in the dtype of a linear layer that reads them; as they are for autocast, and for layers of other kinds,
    which know best."""
    cast = type(layer) is nn.Linear and not autocast_dtype(states)
    return states.to(next(layer.parameters()).dtype) if cast else states


def check_finite(states: Tensor, numbers: Sequence[int], what: str = "Image") -> None:
    """Raises ValueError naming the first of these numbers whose states (or features) [B, ...] are not finite."""
    finite = states.flatten(1).isfinite().all(1)
    if not finite.all():
        number = numbers[int(finite.logical_not().nonzero()[0])]
        raise ValueError(f"{what} {number} gives states that are not finite: is there NaN in its pixels?")


def project(blocks: list[BertSelfAttention], image_embeds: Tensor) -> list[tuple[Tensor, ...]]:
    """`ImageStates.layers` for each of the cross-attentions `blocks`; on a GPU by one matrix product."""
    layers = [layer for block in blocks for layer in (block.key, block.value)]
    heads = blocks[0].num_attention_heads
    if not stackable(layers):
        every = [linear(layer, image_embeds).unflatten(-1, (heads, -1)) for layer in layers]
        return list(zip(every[::2], every[1::2]))
    with cast_weights(stacks=[layers]) as stacked:
        weight, bias = stacked(layers)
    every = F.linear(image_embeds, weight, bias).unflatten(-1, (len(blocks), 2, heads, -1))
    # the gradient of `unbind` is a copy
    return [(x,) for x in (every.unbind(2) if len(blocks) > 1 else [every.squeeze(2)])]


class KeysWhenRead(Sequence):
    """Every layer's keys and values, made when the layer is read first.

    Backward then comes to a layer's matrix product right after its attention, and frees the gradients of keys and
    values before those of the next layer are made; neither these nor the weights are ever all stacked.
    """

    def __init__(self, blocks: list[BertSelfAttention], image_embeds: Tensor):
        self.blocks, self.image_embeds = blocks, image_embeds
        self.made: dict[int, tuple[Tensor, ...]] = {}

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        if i not in self.made:
            (self.made[i],) = project([self.blocks[i]], self.image_embeds)
        return self.made[i]


def text_states(encoder: BertEncoder, states: Tensor, rows: Rows) -> ImageStates:
    """The same of packed texts [T, D] (the questions that VQA's decoder reads), one entry a text."""
    every = image_states(encoder, states[None])
    layers = [tuple(rows.lay_out(x.squeeze(0)) for x in key_value) for key_value in every.layers]
    return ImageStates(layers, rows.mask)


Images = ImageStates | tuple[ImageStates, ImageStates]  # a pair where each text looks at two (NLVR2)


@dataclass
class Part:
    """Texts that share a self-attention: that of `model`. kept: the (start, end) of each text whose states are read."""

    model: BertModel
    text: Ragged
    causal: bool = False
    kept: tuple[int, int] | None = None
    sees: Tensor | None = None  # instead of `causal`: which tokens each sees, bool [B, longest, longest]
    last: Rows = field(init=False)
    rows: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.last, self.layout = self.text.rows, self.text.rows.layout
        self.last_layout = self.layout
        if self.kept:
            self.last, self.rows = self.text.rows.part(*self.kept)
            self.last_layout = Layout(self.last.lengths, self.text.rows.lengths, device=self.text.rows.device)

    def stack(self, i: int, final: bool) -> list[nn.Linear] | None:
        """Layer i's projections, if queries, keys and values are made by one matrix product."""
        if i == 0 and self.text.begun is not None or final and self.rows is not None:
            return None
        inner = self.model.encoder.layer[i].attention.self
        layers = [inner.query, inner.key, inner.value]
        return layers if stackable(layers) else None

    def attend(self, i: int, states: Tensor, final: bool, joined: tuple[Tensor, Tensor] | None) -> Tensor:
        """Layer i's self-attention block over this part's states; of the final layer only the rows that are read.

        joined: weight and bias of what `stack` names.
        """
        block, partial = self.model.encoder.layer[i].attention, final and self.rows is not None
        if i == 0 and self.text.begun is not None:
            return self.text.begun[self.rows] if partial else self.text.begun
        kept = states[self.rows] if partial else states
        inner = block.self
        heads = inner.num_attention_heads
        if joined:
            parts = [F.linear(states, *joined).unflatten(-1, (3, heads, -1))]
        else:
            layers = (inner.query, kept), (inner.key, states), (inner.value, states)
            parts = [
                in_blocks(functools.partial(linear, layer), x).unflatten(-1, (heads, -1))
                for layer, x in layers
            ]
        dropout = inner.dropout.p if inner.training else 0.0
        if self.sees is None:
            layout = self.last_layout if final else self.layout
            first = self.kept[0] if partial and self.causal else None
            context = attention_varlen(parts, layout, causal=self.causal, first=first, dropout=dropout)
        else:
            table = (self.text.rows.lay_out(x).transpose(1, 2) for x in apart(parts))
            context = attention(*table, self.sees[:, None], dropout).transpose(1, 2)
            context = self.layout.queries.take_back(context)
        return in_blocks(block.output, context.flatten(1), kept)


def run(
    parts: list[Part], images: Images | None = None, image: list[list[int] | None] | None = None
) -> list[Tensor]:
    """Last states of each part's texts, [rows read, D].

    All parts share the embeddings, the cross-attention and the feed-forward of the first part's model. image: for each
    part, which image every text looks at (None: text b at image b); without `images` the texts are read alone.
    """
    model = parts[0].model
    states = [part.text.begun for part in parts]
    if any(x is None for x in states):
        states = embeddings(model, [part.text for part in parts])
    images = (images,) if isinstance(images, ImageStates) else images or ()
    seen = final_seen = None
    if images:
        image = image or [None] * len(parts)
        seen = together([part.text.rows for part in parts], image, *images[0].shape)
        final_seen = together([part.last for part in parts], image, *images[0].shape)
    depth = len(model.encoder.layer)
    recompute = model.encoder.config.gradient_checkpointing and model.training and torch.is_grad_enabled()
    for i, layer in enumerate(model.encoder.layer):
        final = i == depth - 1
        looked_at = [(each.layers[i], each.mask) for each in images]  # not in `step`, which may be run twice

        def step(*states: Tensor, i=i, layer=layer, final=final, looked_at=looked_at) -> tuple[Tensor, ...]:
            own = [part.model.encoder.layer[i].attention for part in parts]
            shared = looking(layer.crossattention) if looked_at else []
            stacks = [part.stack(i, final) for part in parts]
            modules = (*own, *shared, layer.intermediate, layer.output)
            with drawn_together(), cast_weights(*modules, stacks=filter(None, stacks)) as stacked:
                joined = [stack and stacked(stack) for stack in stacks]
                attended = [part.attend(i, x, final, one) for part, x, one in zip(parts, states, joined)]
                sizes = [len(x) for x in attended]
                x = torch.cat(attended) if len(parts) > 1 else attended[0]
                if looked_at:
                    x = attend_images(layer.crossattention, x, looked_at, final_seen if final else seen)
                return in_blocks(layer.feed_forward, x).split(sizes)

        how = {"use_reentrant": False, "context_fn": recompute_contexts}
        states = checkpoint(step, *states, **how) if recompute else step(*states)
    return list(states)


def embeddings(model: BertModel, texts: list[Ragged]) -> tuple[Tensor, ...]:
    """Of each batch of texts, [T, D]."""
    ids, positions = zip(*((text.ids, text.rows.position) for text in texts))
    states = model.embeddings(torch.cat(ids)[None], torch.cat(positions)[None]).squeeze(0)
    return states.split([len(text.ids) for text in texts])


def begin(model: BertModel, text: Ragged, size: int = 512) -> Ragged:
    """`text` with the states [T, D] that it has before it looks at an image, made once for any number of images.

    They take embeddings and the first self-attention, `size` texts at a time; `Ragged.pick` gives the texts of a pass.
    For inference: in training every copy of a text has its own dropout.
    """
    states = []
    for start in range(0, len(text.rows.lengths), size):
        some = text.pick(range(start, min(start + size, len(text.rows.lengths))))
        part = Part(model, some)
        stack = part.stack(0, final=False)
        states.append(part.attend(0, *embeddings(model, [some]), False, stack and stacked(stack)))
    return Ragged(text.ids, text.rows, torch.cat(states))


def together(rows: list[Rows], image: list[list[int] | None], images: int, tokens: int) -> Layout:
    """Which image each text of several parts, one behind the other, looks at."""
    lengths = [length for part in rows for length in part.lengths]
    each = [range(len(part.lengths)) if of is None else of for part, of in zip(rows, image)]
    return reads(lengths, [m for of in each for m in of], images, tokens, rows[0].device)


def inners(block: nn.Module) -> list[BertSelfAttention]:
    """The attentions of a cross-attention block: to one image, or to each of two."""
    return [block.self] if hasattr(block, "self") else [block.self0, block.self1]


def looking(block: nn.Module) -> list[nn.Module]:
    """What `attend_images` calls of a cross-attention block: all but keys and values, which are made elsewhere."""
    return [*(inner.query for inner in inners(block)), block.output]


def attend_images(block, states: Tensor, images: list[tuple], layout: Layout) -> Tensor:
    """A layer's cross-attention block over packed states [T, D]; images: (keys and values, mask) of one or of two."""
    contexts = []
    for inner, (key_value, mask) in zip(inners(block), images, strict=True):
        dropout = inner.dropout.p if inner.training else 0.0
        keep = inner.keep if inner.save_attention else None
        query = in_blocks(functools.partial(linear, inner.query), states)
        contexts.append(cross_attention(query, key_value, layout, mask, dropout, keep))
    if len(contexts) == 2:
        return block.output(contexts, states)
    return in_blocks(block.output, contexts[0], states)


def first_states(
    model: BertModel, text: Ragged, images: Images | None = None, image: list[int] | None = None
) -> Tensor:
    """The state of each text's first token, [B, D]: all that ITC, ITM and NLVR2 read."""
    return run([Part(model, text, kept=(0, 1))], images, [image])[0]


def all_states(
    model: BertModel, text: Ragged, images: Images | None = None, image: list[int] | None = None
) -> Tensor:
    """Every token's state, packed [T, D]."""
    return run([Part(model, text)], images, [image])[0]


def language_part(decoder: BertLMHeadModel, text: Ragged, prompt_length: int = 1) -> Part:
    """The decoder's part: causal, and of the last layer the tokens that predict one after the prompt."""
    return Part(decoder.bert, text, causal=True, kept=(prompt_length - 1, -1))


def language_loss(decoder: BertLMHeadModel, part: Part, states: Tensor, reduction: str = "mean") -> Tensor:
    """Next-token loss of a decoder's part from its last states, with the decoder's label smoothing, in fp32.

    "mean": over the predicted tokens; "none": one sum a text, [B]. Raises ValueError if nothing is to be predicted.
    """
    if not len(part.last):
        raise ValueError("No text has a token after the prompt, so there is nothing to predict.")
    labels = part.text.ids[part.rows + 1]
    head = decoder.cls.predictions
    hidden = in_blocks(head.transform, states)
    how = {"label_smoothing": decoder.config.label_smoothing, "reduction": reduction}
    if is_plain(head.decoder):
        losses = linear_cross_entropy(hidden, head.decoder.weight, head.decoder.bias, labels, **how)
    else:
        losses = F.cross_entropy(head.decoder(hidden).float(), labels, **how)
    return losses if reduction == "mean" else part.last.lay_out(losses).sum(1)
