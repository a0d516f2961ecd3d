"""BLIP in one plain file, slow on purpose: the specification that every fast path is compared with.

Read it top to bottom: ViT, MED (the BERT that may look at an image), losses, generation, the seven models.
Nothing here is fused, cached, packed or distributed, and no string is tokenised: a `Text` holds token ids, every row
being `[CLS] words [SEP] [PAD]*`. Attribute names follow the official checkpoints, so one state_dict loads here and
there. What stands at position 0 names the role that a text plays:

    [CLS] text encoder (ITC)      [ENC] image-grounded encoder (ITM, MLM, questions)      [DEC] decoder (LM)

Shape letters: B batch, N image tokens (patches + 1), T text tokens, D width, H heads, V vocabulary, E embed_dim (the
contrastive space), Q queue, K candidates, P prompt tokens, S side of a picture in pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # a label that takes no part in a loss
MASKED = -10000.0  # added to the scores of masked keys; the softmax then gives exactly zero in fp32


@dataclass(frozen=True)
class Tokens:
    """Ids of the special tokens; by default those of bert-base-uncased plus [DEC] and [ENC]."""

    pad: int = 0
    cls: int = 101
    sep: int = 102
    mask: int = 103
    dec: int = 30522
    enc: int = 30523


@dataclass(frozen=True)
class Text:
    """A batch of texts: ids [B, T] int64, and mask [B, T], 1 on tokens and 0 on padding."""

    ids: Tensor
    mask: Tensor

    def starting(self, token: int) -> Text:
        """The same texts with `token` at position 0."""
        return Text(torch.cat([torch.full_like(self.ids[:, :1], token), self.ids[:, 1:]], 1), self.mask)

    def __getitem__(self, rows: Tensor) -> Text:
        return Text(self.ids[rows], self.mask[rows])

    def __add__(self, other: Text) -> Text:
        return Text(torch.cat([self.ids, other.ids]), torch.cat([self.mask, other.mask]))


@dataclass
class Bert:
    """The keys of med_config.json that change what is computed."""

    vocab_size: int = 30524
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    pad_token_id: int = 0
    encoder_width: int = 768  # of the states that cross-attention reads; set from what they are


# --------------------------------------------------------------------------------------------- vision transformer

VITS = {
    "base": {"width": 768, "depth": 12, "heads": 12, "patch_size": 16},
    "large": {"width": 1024, "depth": 24, "heads": 16, "patch_size": 16},
}


class VitAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)  # rows: q, then k, then v; in each, head after head
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, N, D/H]
        attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One pre-norm block. Drop-path drops a whole residual branch of a sample and scales up those that are kept."""

    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VitAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.drop_path = drop_path

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        return branch / keep * (torch.rand(len(branch), 1, 1, device=branch.device) < keep)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class VisionTransformer(nn.Module):
    """Picture [B, 3, S, S] -> image_embeds [B, N, D]; token 0 is the class token. Drop-path grows with depth.

    `vit`: 'base', 'large' or {width, depth, heads, patch_size}. Official: the large one always has drop-path 0.1.
    """

    def __init__(self, vit: str | dict[str, int], image_size: int, drop_path: float = 0.0) -> None:
        super().__init__()
        own = VITS[vit] if isinstance(vit, str) else vit
        width, depth, heads, patch = own["width"], own["depth"], own["heads"], own["patch_size"]
        self.width = width
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch) ** 2 + 1, width))
        step = (0.1 if vit == "large" else drop_path) / max(depth - 1, 1)
        self.blocks = nn.ModuleList(Block(width, heads, i * step) for i in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](image).flatten(2).transpose(1, 2)  # [B, N-1, D], row by row
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# ---------------------------------------------------------------------------------- MED: BERT with cross-attention


class BertEmbeddings(nn.Module):
    """Word + position, LayerNorm, dropout. BERT's token types are not used."""

    def __init__(self, config: Bert) -> None:
        super().__init__()
        D, places = config.hidden_size, config.max_position_embeddings
        self.word_embeddings = nn.Embedding(config.vocab_size, D, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(places, D)
        self.LayerNorm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer("position_ids", torch.arange(places)[None])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.word_embeddings(ids) + self.position_embeddings(self.position_ids[:, : ids.shape[1]])
        return self.dropout(self.LayerNorm(x))


class BertSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(D / H) + mask) v; keys and values come from `states`: the text itself, or an image."""

    def __init__(self, config: Bert, states_width: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = (
            nn.Linear(D, D),
            nn.Linear(states_width, D),
            nn.Linear(states_width, D),
        )
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, T, D] -> [B, H, T, D/H]

    def forward(self, x: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self._heads(self.query(x)), self._heads(self.key(states)), self._heads(self.value(states))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + mask  # mask: broadcastable to [B, H, T, keys]
        return (self.dropout(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)


class BertSelfOutput(nn.Module):
    """LayerNorm(x + dropout(dense(h))): the post-norm end of an attention and of the feed-forward."""

    def __init__(self, config: Bert, width_in: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(x + self.dropout(self.dense(h)))


class BertAttention(nn.Module):
    def __init__(self, config: Bert, states_width: int) -> None:
        super().__init__()
        self.self = BertSelfAttention(config, states_width)
        self.output = BertSelfOutput(config, config.hidden_size)

    def forward(self, x: Tensor, states: Tensor, mask: Tensor | float) -> Tensor:
        return self.output(self.self(x, states, mask), x)


class TwinOutput(nn.Module):
    """NLVR: what attention read from two images becomes one: the mean, from layer 6 on a learned merge."""

    def __init__(self, config: Bert, layer: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.dense0, self.dense1 = nn.Linear(D, D), nn.Linear(D, D)
        self.merge_layer = nn.Linear(2 * D, D) if layer >= 6 else None
        self.LayerNorm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, h0: Tensor, h1: Tensor, x: Tensor) -> Tensor:
        h0, h1 = self.dense0(h0), self.dense1(h1)
        merged = (h0 + h1) / 2 if self.merge_layer is None else self.merge_layer(torch.cat([h0, h1], -1))
        return self.LayerNorm(x + self.dropout(merged))


class TwinAttention(nn.Module):
    """NLVR: `states` is a pair of images; each is read with attention weights of its own."""

    def __init__(self, config: Bert, layer: int) -> None:
        super().__init__()
        self.self0 = BertSelfAttention(config, config.encoder_width)
        self.self1 = BertSelfAttention(config, config.encoder_width)
        self.output = TwinOutput(config, layer)

    def forward(self, x: Tensor, states: tuple[Tensor, Tensor], mask: Tensor | float) -> Tensor:
        return self.output(self.self0(x, states[0], mask), self.self1(x, states[1], mask), x)


class BertLayer(nn.Module):
    """Self-attention, then cross-attention if there is something to look at, then feed-forward; each post-norm."""

    def __init__(self, config: Bert, layer: int, twin: bool) -> None:
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        self.attention = BertAttention(config, D)
        cross = TwinAttention(config, layer) if twin else BertAttention(config, config.encoder_width)
        self.crossattention = cross
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, width)})
        self.output = BertSelfOutput(config, width)

    def forward(self, x: Tensor, mask: Tensor, states: Any, states_mask: Tensor | float) -> Tensor:
        x = self.attention(x, x, mask)
        if states is not None:
            x = self.crossattention(x, states, states_mask)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class BertModel(nn.Module):
    """Text -> states [B, T, D].

    states given: mode 'multimodal', every layer looks at them; None: mode 'text'. states_mask None: all of them are
    real (images). causal: a position sees itself and what comes before it.
    """

    def __init__(self, config: Bert, twin: bool = False) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        layers = nn.ModuleList(BertLayer(config, i, twin) for i in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.apply(init_bert)

    def forward(
        self, text: Text, states: Any = None, states_mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        visible = text.mask[:, None, None, :].float().expand(-1, -1, text.ids.shape[1], -1)  # [B, 1, T, keys]
        visible = visible.tril() if causal else visible
        cross_mask = 0.0 if states_mask is None else (1 - states_mask[:, None, None, :].float()) * MASKED
        x = self.embeddings(text.ids)
        for layer in self.encoder["layer"]:
            x = layer(x, (1 - visible) * MASKED, states, cross_mask)
        return x


class BertPredictions(nn.Module):
    """States [..., D] -> logits [..., V]; the output matrix is the word embedding."""

    def __init__(self, config: Bert, word_embeddings: nn.Parameter) -> None:
        super().__init__()
        D = config.hidden_size
        norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.transform = nn.ModuleDict({"dense": nn.Linear(D, D), "LayerNorm": norm})
        self.decoder = nn.Linear(D, config.vocab_size)
        self.decoder.weight = word_embeddings
        self.bias = self.decoder.bias  # one parameter, two names in a checkpoint
        self.apply(init_bert)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform["LayerNorm"](F.gelu(self.transform["dense"](x))))


class BertLMHeadModel(nn.Module):
    """The causal decoder: a text and the states it looks at -> logits [B, T, V], at t those of token t + 1."""

    def __init__(self, config: Bert) -> None:
        super().__init__()
        self.bert = BertModel(config)
        head = BertPredictions(config, self.bert.embeddings.word_embeddings.weight)
        self.cls = nn.ModuleDict({"predictions": head})

    def forward(self, text: Text, states: Tensor, states_mask: Tensor | None = None) -> Tensor:
        return self.cls["predictions"](self.bert(text, states, states_mask, causal=True))


def init_bert(module: nn.Module) -> None:
    """BERT's initialisation: weights N(0, 0.02), biases zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def tie_encoder_decoder_weights(encoder: BertModel, decoder: BertModel) -> None:
    """Share all but self-attention: the encoder takes the decoder's embeddings, cross-attention and feed-forward."""
    for name, module in encoder.named_modules():
        if "attention" not in name.split("."):  # 'crossattention' is another word
            for key in [key for key, _ in module.named_parameters(recurse=False)]:
                setattr(module, key, getattr(decoder.get_submodule(name), key))


# --------------------------------------------------------------------------------------------------------- losses


def lm_labels(text: Text, pad: int) -> Tensor:
    """Labels [B, T] of a decoder text: its ids, IGNORE on padding."""
    return text.ids.masked_fill(text.ids == pad, IGNORE)


def lm_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.1, reduction: str = "mean") -> Tensor:
    """Next-token cross-entropy of logits [B, T, V] and labels [B, T], not yet shifted, IGNORE where given.

    Smoothing e puts the share e of the target on all V tokens alike. 'mean': over valid tokens; 'none': sums [B].
    """
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:]
    loss = F.cross_entropy(logits, labels.flatten(), reduction="none", label_smoothing=smoothing)
    return loss.view(labels.shape).sum(1) if reduction == "none" else loss.sum() / (labels != IGNORE).sum()


@torch.no_grad()
def itc_targets(feat_m: Tensor, keys: Tensor, positives: Tensor, temp: Tensor, alpha: float) -> Tensor:
    """[B, B + Q]: alpha * what the momentum model believes + (1 - alpha) * the truth, shared among the positives."""
    return alpha * (feat_m @ keys / temp).softmax(1) + (1 - alpha) * positives / positives.sum(
        1, keepdim=True
    )


def itc_loss(feat: Tensor, keys: Tensor, targets: Tensor, temp: Tensor) -> Tensor:
    """Cross-entropy with soft targets [B, B + Q] in one direction; BLIP takes the mean of the two directions.

    feat [B, E]: online and normalised, the only side with a gradient (besides temp). keys [E, B + Q]: momentum
    features of the other modality, those of this rank's own batch first, then the queue, where all ranks write.
    """
    return -((feat @ keys / temp).log_softmax(1) * targets).sum(1).mean()


@torch.no_grad()
def hard_negatives(similarity: Tensor, same: Tensor, floor: float) -> Tensor:
    """For each row of similarity [B, B] (divided by the temperature) draw one column [B], hard ones more often.

    Weights are softmax + floor, and 0 where `same` [B, B] says that a column belongs to the row.
    """
    weights = (similarity.softmax(1) + floor).masked_fill(same, 0.0)
    if (weights.sum(1) == 0).any():
        raise ValueError("a sample has no negative in its batch; ITM needs two different pairs in each batch")
    return torch.multinomial(weights, 1)[:, 0]


def itm_loss(logits: Tensor) -> Tensor:
    """Cross-entropy of logits [3B, 2], the first B being matches (class 1). Predicting the prior gives 0.6365."""
    matches = torch.arange(len(logits), device=logits.device) < len(logits) // 3
    return F.cross_entropy(logits, matches.long())


def mlm_mask(text: Text, tokens: Tokens, vocab_size: int, probability: float = 0.15) -> tuple[Text, Tensor]:
    """BERT masking -> (text with words replaced, labels [B, T], IGNORE where nothing was chosen).

    Of the chosen words 80 % become [MASK], 10 % a random word, 10 % stay. Position 0, [SEP] and padding never are.
    """
    ids = text.ids
    chosen = (torch.rand(ids.shape, device=ids.device) < probability) & text.mask.bool() & (ids != tokens.sep)
    chosen[:, 0] = False
    fate = torch.rand(ids.shape, device=ids.device)
    words = torch.where(chosen & (fate < 0.8), tokens.mask, ids)
    words = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), torch.randint_like(ids, vocab_size), words)
    return Text(words, text.mask), torch.where(chosen, ids, IGNORE)


def mlm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the masked positions, without smoothing; 0 if nothing is masked."""
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / (labels != IGNORE).sum().clamp(min=1)


# ----------------------------------------------------------------------------------------------------- generation

NextLogits = Callable[[Tensor], Tensor]  # ids [n, t] -> logits [n, V] of the token after the last


def next_logits_of(decoder: BertLMHeadModel, states: Tensor) -> NextLogits:
    """The decoder as a function of ids alone. states: [n, N, D], or [1, N, D] for all rows."""
    return lambda ids: decoder(Text(ids, torch.ones_like(ids)), states.expand(len(ids), -1, -1))[:, -1]


def penalise(scores: Tensor, ids: Tensor, repetition_penalty: float, min_length: int, eos: int) -> Tensor:
    """Scores [n, V] with all tokens of ids [n, t] (prompt and [DEC] too) made less likely, and `eos` impossible
    while t < min_length. Scores are logits; in beam search log-probabilities, not normalised again afterwards."""
    seen = scores.gather(1, ids)
    less = torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)
    scores = scores.scatter(1, ids, less)
    if ids.shape[1] < min_length:
        scores[:, eos] = -torch.inf
    return scores


def nucleus(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """Probabilities [n, V] of the top_k tokens, of these the likeliest until their sum exceeds top_p."""
    kth = logits.topk(min(top_k, logits.shape[1]))[0][:, -1:]
    logits = logits.masked_fill(logits < kth, -torch.inf)
    ordered, order = logits.sort(dim=1, descending=True)
    before = ordered.softmax(1).cumsum(1).roll(1, 1)  # the mass of all likelier tokens
    before[:, 0] = 0.0
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before > top_p)
    return logits.masked_fill(dropped, -torch.inf).softmax(1)


def decode(
    next_logits: NextLogits, prompt: Tensor, choose: Callable[[Tensor], Tensor], pad: int,
    max_length: int, min_length: int, eos: int, repetition_penalty: float,
) -> Tensor:  # fmt: skip
    """Token by token from prompt [B, P]; `choose`: scores [B, V] -> [B]. Returns [B, <= max_length], padded."""
    ids, running = prompt, torch.ones(len(prompt), dtype=torch.bool, device=prompt.device)
    while ids.shape[1] < max_length and running.any():
        token = choose(penalise(next_logits(ids), ids, repetition_penalty, min_length, eos))
        ids = torch.cat([ids, token.where(running, pad)[:, None]], 1)
        running = running & (token != eos)
    return ids


def beam_search(
    next_logits: NextLogits, prompt: Tensor, num_beams: int, length_norm: str,
    max_length: int, min_length: int, eos: int, repetition_penalty: float,
) -> list[int]:  # fmt: skip
    """Beam search from one prompt [P]; returns the best sequence, with `eos` if it ended before max_length.

    A hypothesis is worth its sum of log-probabilities / length. All lengths in arguments include the prompt.
    length_norm 'with_prompt' (official BLIP, transformers 4.15): length counts the prompt but not the end; the search
    stops once the worst of num_beams hypotheses is worth at least the best candidate / length before this step.
    'generated' (transformers since 4.36; stopping as in 5.23): length counts new tokens and the end; the search
    stops once the worst hypothesis is worth at least the best beam still running.
    """
    if length_norm not in ("with_prompt", "generated"):
        raise ValueError(f"length_norm is {length_norm!r}; expected 'with_prompt' or 'generated'")
    generated, P = length_norm == "generated", len(prompt)
    hypotheses: list[tuple[float, list[int]]] = []  # the best num_beams, ascending
    beams = [(0.0, prompt.tolist())] + [(-1e9, prompt.tolist())] * (
        num_beams - 1
    )  # all alike at first: use one

    def add(total: float, sequence: list[int], length: int) -> None:
        hypotheses.append((total / length, sequence))
        hypotheses.sort(key=lambda hypothesis: hypothesis[0])
        del hypotheses[:-num_beams]

    for t in range(P, max_length):
        ids = torch.tensor([sequence for _, sequence in beams], device=prompt.device)
        scores = penalise(next_logits(ids).log_softmax(1), ids, repetition_penalty, min_length, eos)
        scores = scores + torch.tensor([total for total, _ in beams], device=prompt.device)[:, None]
        best, where = scores.flatten().topk(2 * num_beams)  # enough: at most num_beams of them end
        running = []
        for rank, (total, index) in enumerate(zip(best.tolist(), where.tolist(), strict=True)):
            beam, token = divmod(index, scores.shape[1])
            sequence = beams[beam][1] + [token]
            if token != eos:
                running.append((total, sequence))
            elif rank < num_beams:  # an end further down is forgotten
                add(total, sequence, t + 1 - P if generated else t)
        beams = running[:num_beams]
        bound = beams[0][0] / (t + 1 - P) if generated else best[0].item() / t
        if len(hypotheses) == num_beams and hypotheses[0][0] >= bound:
            return hypotheses[-1][1]
    for total, sequence in beams:  # at max_length what still runs competes as it is
        add(total, sequence, max_length - P if generated else max_length)
    return hypotheses[-1][1]


@torch.no_grad()
def generate(
    decoder: BertLMHeadModel, states: Tensor, prompt: Tensor, tokens: Tokens, *, num_beams: int = 3,
    max_length: int = 30, min_length: int = 10, repetition_penalty: float = 1.0, length_norm: str = "with_prompt",
    sampling: bool = False, top_p: float = 0.9, top_k: int = 50,
) -> Tensor:  # fmt: skip
    """Ids [B, L] from states [B, N, D] and prompt [B, P]: beams, greedy (num_beams 1) or nucleus sampling."""

    def choose(scores: Tensor) -> Tensor:
        return torch.multinomial(nucleus(scores, top_p, top_k), 1)[:, 0] if sampling else scores.argmax(1)

    limits = (max_length, min_length, tokens.sep, repetition_penalty)
    if sampling or num_beams == 1:
        return decode(next_logits_of(decoder, states), prompt, choose, tokens.pad, *limits)
    rows = []
    for b in range(len(prompt)):  # pictures do not meet: each has a search of its own
        next_logits = next_logits_of(decoder, states[b : b + 1])
        rows.append(beam_search(next_logits, prompt[b], num_beams, length_norm, *limits))
    padded = [row + [tokens.pad] * (max(map(len, rows)) - len(row)) for row in rows]
    return torch.tensor(padded, device=prompt.device)


# --------------------------------------------------------------------------------------------------------- models


class Blip(nn.Module):
    """What all models have: an image encoder, the BERT config and the special tokens.

    vit: see VisionTransformer. bert: keys of med_config.json, further ones are ignored. label_smoothing: of the LM.
    """

    def __init__(
        self, vit: Any = "base", image_size: int = 384, bert: dict[str, Any] | None = None,
        tokens: Tokens = Tokens(), label_smoothing: float = 0.1, drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens, self.label_smoothing = tokens, label_smoothing
        self.visual_encoder = VisionTransformer(vit, image_size, drop_path)
        known = {key: value for key, value in (bert or {}).items() if key in Bert.__dataclass_fields__}
        self.bert = Bert(**known | {"encoder_width": self.visual_encoder.width})


class BLIP_Base(Blip):
    """Feature extractor (official default: pictures of 224)."""

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.text_encoder = BertModel(self.bert)

    def forward(self, image: Tensor | None, text: Text | None, mode: str) -> Tensor:
        """'image': [B, N, D_v]; 'text': [B, T, D]; 'multimodal': [B, T, D] of the text that looks at the image."""
        if mode == "text":
            return self.text_encoder(text)
        image_embeds = self.visual_encoder(image)
        if mode == "image":
            return image_embeds
        return self.text_encoder(text.starting(self.tokens.enc), image_embeds)


class BLIP_Decoder(Blip):
    """Captioning. prompt_length: tokens of `[DEC] a picture of`, which are given and not learned."""

    def __init__(self, prompt_length: int = 4, **common: Any) -> None:
        super().__init__(**common)
        self.prompt_length = prompt_length
        self.text_decoder = BertLMHeadModel(self.bert)

    def logits(self, image: Tensor, text: Text) -> Tensor:
        return self.text_decoder(text.starting(self.tokens.dec), self.visual_encoder(image))

    def forward(self, image: Tensor, text: Text) -> Tensor:
        """LM loss of the captions `[CLS] prompt caption [SEP]`."""
        labels = lm_labels(text, self.tokens.pad)
        labels[:, : self.prompt_length] = IGNORE
        return lm_loss(self.logits(image, text), labels, self.label_smoothing)

    @torch.no_grad()
    def generate(self, image: Tensor, prompt: Tensor, **options: Any) -> Tensor:
        """Ids [B, L] that begin with prompt [B, P]: `[CLS] words` without [SEP], of which [CLS] becomes [DEC].

        Sampling (option sampling=True) always has repetition_penalty 1.1, beside top_k 50, as official BLIP has it.
        """
        options |= {"repetition_penalty": 1.1} if options.get("sampling") else {}
        start = Text(prompt, prompt).starting(self.tokens.dec).ids
        return generate(self.text_decoder, self.visual_encoder(image), start, self.tokens, **options)


class BLIP_ITM(Blip):
    """Image-text matching: the ITM head on [ENC], and cosines in the space of E dimensions."""

    def __init__(self, embed_dim: int = 256, **common: Any) -> None:
        super().__init__(**common)
        self.text_encoder = BertModel(self.bert)
        self.vision_proj = nn.Linear(self.visual_encoder.width, embed_dim)
        self.text_proj = nn.Linear(self.bert.hidden_size, embed_dim)
        self.itm_head = nn.Linear(self.bert.hidden_size, 2)

    def forward(self, image: Tensor, text: Text, match_head: str = "itm", first: int | None = None) -> Tensor:
        """'itm': logits [B, 2], class 1 being a match; 'itc': cosines [B images, B texts].

        first: the token put at position 0 for 'itm'. Training uses [ENC], the default here; official BLIP_ITM and
        Hugging Face leave [CLS].
        """
        image_embeds = self.visual_encoder(image)
        if match_head == "itm":
            text = text.starting(self.tokens.enc if first is None else first)
            return self.itm_head(self.text_encoder(text, image_embeds)[:, 0])
        image_feat = F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)
        return image_feat @ F.normalize(self.text_proj(self.text_encoder(text)[:, 0]), dim=-1).T


class Contrastive(BLIP_ITM):
    """What retrieval and pre-training share: momentum copies, a queue of their features, ITC and ITM.

    One step: clamp the temperature; move the momentum copies towards the weights that the last optimizer step left;
    ITC against batch + queue; write the batch into the queue; ITM. In a run of many ranks each does this with its own
    batch, and only what is written into the queue is gathered from all.
    """

    averaged = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")

    def __init__(
        self, embed_dim: int = 256, queue_size: int = 57600, momentum: float = 0.995, **common: Any
    ) -> None:
        super().__init__(embed_dim, **common)
        self.momentum = momentum
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.register_buffer("image_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))

    def make_momentum_copies(self) -> None:
        for name in self.averaged:
            setattr(self, f"{name}_m", copy.deepcopy(getattr(self, name)).requires_grad_(False))

    @torch.no_grad()
    def update_momentum(self) -> None:
        """Average = momentum * average + (1 - momentum) * online. The copies stay in train mode: dropout acts."""
        for name in self.averaged:
            copies = getattr(self, f"{name}_m").parameters()
            for average, online in zip(copies, getattr(self, name).parameters(), strict=True):
                average.mul_(self.momentum).add_(online, alpha=1 - self.momentum)

    def features(self, image: Tensor, text: Text, suffix: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """image_embeds [B, N, D_v], image_feat [B, E], text_feat [B, E]; suffix '_m': of the momentum model."""
        encode_image, project_image, encode_text, project_text = (
            getattr(self, n + suffix) for n in self.averaged
        )
        image_embeds = encode_image(image)
        image_feat = F.normalize(project_image(image_embeds[:, 0]), dim=-1)
        return image_embeds, image_feat, F.normalize(project_text(encode_text(text)[:, 0]), dim=-1)

    def itc(
        self, image: Tensor, text: Text, positives: Tensor, alpha: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """ITC loss, and (image_embeds, image_feat, text_feat, image_feat_m, text_feat_m).

        positives [B, B + Q]: 1 where a key (own batch, then queue) belongs to the row, else 0.
        """
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
            self.update_momentum()
            _, image_feat_m, text_feat_m = self.features(image, text, "_m")
            image_keys = torch.cat([image_feat_m.T, self.image_queue], 1)
            text_keys = torch.cat([text_feat_m.T, self.text_queue], 1)
        i2t_targets = itc_targets(image_feat_m, text_keys, positives, self.temp, alpha)
        t2i_targets = itc_targets(text_feat_m, image_keys, positives, self.temp, alpha)
        image_embeds, image_feat, text_feat = self.features(image, text)
        i2t = itc_loss(image_feat, text_keys, i2t_targets, self.temp)
        t2i = itc_loss(text_feat, image_keys, t2i_targets, self.temp)
        return (i2t + t2i) / 2, (image_embeds, image_feat, text_feat, image_feat_m, text_feat_m)

    @torch.no_grad()
    def enqueue(self, pointer: Tensor, **columns: Tensor) -> None:
        """Write columns [*, B] into the ring buffers [*, Q] of these names, at the pointer and round the end."""
        Q, count = self.image_queue.shape[1], columns["image_queue"].shape[1]
        for name, column in columns.items():
            getattr(self, name)[:, (pointer + torch.arange(count, device=pointer.device)) % Q] = column
        pointer.copy_((pointer + count) % Q)

    def itm(self, image_embeds: Tensor, text: Text, negatives: tuple[Tensor, Tensor]) -> Tensor:
        """ITM loss of B matches, B texts with a wrong image, B images with a wrong text.

        negatives: for each text the index of its wrong image [B], for each image that of its wrong text [B].
        """
        wrong_image, wrong_text = negatives
        text = text.starting(self.tokens.enc)
        images = torch.cat([image_embeds, image_embeds[wrong_image], image_embeds])
        states = self.text_encoder(text + text + text[wrong_text], images)
        return itm_loss(self.itm_head(states[:, 0]))


class BLIP_Retrieval(Contrastive):
    """Fine-tuning for retrieval: ITC and ITM. All texts of a picture (by `idx`) are its positives."""

    def __init__(self, queue_size: int = 57600, **common: Any) -> None:
        super().__init__(queue_size=queue_size, **common)
        self.register_buffer("idx_queue", torch.full((1, queue_size), -100))
        self.register_buffer("ptr_queue", torch.zeros(1, dtype=torch.long))
        self.make_momentum_copies()

    def forward(
        self,
        image: Tensor,
        text: Text,
        alpha: float,
        idx: Tensor,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(loss_itc, loss_itm). idx [B] int64: which picture each row shows. negatives: see `itm`."""
        positives = (idx[:, None] == torch.cat([idx[None], self.idx_queue], 1)).float()
        loss_itc, (image_embeds, image_feat, text_feat, *momentum) = self.itc(image, text, positives, alpha)
        self.enqueue(self.ptr_queue, image_queue=momentum[0].T, text_queue=momentum[1].T, idx_queue=idx[None])
        if negatives is None:  # by the online features of both sides
            i2t, same = image_feat @ text_feat.T / self.temp, idx[:, None] == idx
            negatives = hard_negatives(i2t.T, same, floor=0.0), hard_negatives(i2t, same, floor=0.0)
        return loss_itc, self.itm(image_embeds, text, negatives)


class BLIP_Pretrain(Contrastive):
    """ITC + ITM + LM (+ MLM). Encoder and decoder share all but self-attention (official: pictures of 224)."""

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.text_decoder = BertLMHeadModel(self.bert)
        tie_encoder_decoder_weights(self.text_encoder, self.text_decoder.bert)
        # Official BLIP copies before it ties, from one BERT; started from random weights that would give the
        # momentum model word embeddings unrelated to the online ones, so here the copies are of the tied weights.
        self.make_momentum_copies()

    def forward(
        self, image: Tensor, text: Text, alpha: float, negatives: tuple[Tensor, Tensor] | None = None,
        mlm: tuple[Text, Tensor] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Losses 'itc', 'itm', 'lm', and 'mlm' if what `mlm_mask` made of the text is given. negatives: see `itm`."""
        B, Q = len(image), self.image_queue.shape[1]
        own = torch.eye(B, B + Q, device=image.device)
        losses = {}
        losses["itc"], (image_embeds, *online, image_feat_m, text_feat_m) = self.itc(image, text, own, alpha)
        self.enqueue(self.queue_ptr, image_queue=image_feat_m.T, text_queue=text_feat_m.T)
        if negatives is None:  # by online queries and momentum keys; only the pair itself is excluded
            t2i, i2t = online[1] @ image_feat_m.T / self.temp, online[0] @ text_feat_m.T / self.temp
            same = own[:, :B].bool()
            negatives = hard_negatives(t2i, same, floor=1e-4), hard_negatives(i2t, same, floor=1e-4)
        losses["itm"] = self.itm(image_embeds, text, negatives)
        decoded = text.starting(self.tokens.dec)
        labels = lm_labels(decoded, self.tokens.pad)
        losses["lm"] = lm_loss(self.text_decoder(decoded, image_embeds), labels, self.label_smoothing)
        if mlm is not None:
            states = self.text_encoder(mlm[0].starting(self.tokens.enc), image_embeds)
            losses["mlm"] = mlm_loss(self.text_decoder.cls["predictions"](states), mlm[1])
        return losses


class BLIP_VQA(Blip):
    """The encoder reads the question and looks at the image; the decoder answers and looks at what was read.

    Official default: pictures of 480.
    """

    def __init__(self, **common: Any) -> None:
        super().__init__(drop_path=0.1, **common)
        self.text_encoder = BertModel(self.bert)
        decoder_config = copy.copy(self.bert)
        decoder_config.encoder_width = self.bert.hidden_size
        self.text_decoder = BertLMHeadModel(decoder_config)

    def question_states(self, image: Tensor, question: Text, first: int | None = None) -> Tensor:
        """[B, T, D]. first: the token at position 0, by default [ENC]; Hugging Face leaves [CLS]."""
        question = question.starting(self.tokens.enc if first is None else first)
        return self.text_encoder(question, self.visual_encoder(image))

    def answer_losses(self, states: Tensor, states_mask: Tensor, answer: Text) -> Tensor:
        """LM loss, smoothed, summed over the tokens of each answer [n]. states [n, T, D]: of the question of each."""
        answer = answer.starting(self.tokens.dec)
        labels = lm_labels(answer, self.tokens.pad)
        return lm_loss(self.text_decoder(answer, states, states_mask), labels, self.label_smoothing, "none")

    def forward(self, image: Tensor, question: Text, answer: Text, n: list[int], weights: Tensor) -> Tensor:
        """Weighted sum of the answer losses / B. n[b] answers belong to question b, in order; weights: one each."""
        owner = torch.tensor([b for b, count in enumerate(n) for _ in range(count)], device=image.device)
        states = self.question_states(image, question)
        return (weights * self.answer_losses(states[owner], question.mask[owner], answer)).sum() / len(image)

    @torch.no_grad()
    def rank(self, image: Tensor, question: Text, answers: Text, k: int = 128) -> Tensor:
        """Index [B] of the best of K answers: of the k with the likeliest first token, the one with least loss."""
        states = self.question_states(image, question)
        start = torch.full((len(image), 1), self.tokens.dec, device=image.device)
        first = self.text_decoder(Text(start, torch.ones_like(start)), states, question.mask)[:, 0].softmax(1)
        shortlists = first[:, answers.ids[:, 1]].topk(min(k, len(answers.ids)))[1]  # [B, k]
        best = []
        for b, shortlist in enumerate(shortlists):
            rows = torch.full_like(shortlist, b)
            losses = self.answer_losses(states[rows], question.mask[rows], answers[shortlist])
            best.append(shortlist[losses.argmin()])
        return torch.stack(best)

    @torch.no_grad()
    def generate(self, image: Tensor, question: Text, first: int | None = None, **options: Any) -> Tensor:
        """Answer ids [B, L] from [DEC] on. The padding of a question is looked at too: an official quirk."""
        start = torch.full((len(image), 1), self.tokens.dec, device=image.device)
        options = {"max_length": 10, "min_length": 1} | options
        states = self.question_states(image, question, first)
        return generate(self.text_decoder, states, start, self.tokens, **options)


class BLIP_NLVR(Blip):
    """Is a sentence true of two images? (Official default: pictures of 480.)"""

    def __init__(self, **common: Any) -> None:
        super().__init__(drop_path=0.1, **common)
        D = self.bert.hidden_size
        self.text_encoder = BertModel(self.bert, twin=True)
        self.cls_head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 2))

    def logits(self, image: Tensor, text: Text) -> Tensor:
        """[B, 2]. image [2B, 3, S, S]: the first images of all pairs, then the second ones."""
        image_embeds = self.visual_encoder(image).chunk(2)
        return self.cls_head(self.text_encoder(text.starting(self.tokens.enc), image_embeds)[:, 0])

    def forward(self, image: Tensor, text: Text, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(image, text), targets)
