"""MED, the multimodal mixture of encoder and decoder: BERT with cross-attention to the image in every layer.

Same classes, call signatures and state_dict keys as official `models/med.py`, without transformers.
Post-norm order: self-attention, cross-attention (mode "multimodal"), feed-forward. LayerNorm eps 1e-12, exact GELU,
no token-type embeddings. Shapes: B texts, T text tokens, N image tokens, H heads, D width, V vocabulary.

`forward` here takes padded texts, as official code calls it, and can keep attention maps. BLIP's own models go
through `packed` (training, matching) and `decoding` (generation): the same weights, without the padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blipfast.backends import recompute_contexts
from blipfast.ops.attention import attention
from blipfast.ops.layer_norm import dropout_add_layer_norm
from blipfast.ops.linear import has_hooks, is_plain, linear
from blipfast.ops.mlp import mlp

from .kept_attention import KeepsAttention
from .med_config import BertConfig, Output

KeyValue = tuple[Tensor, Tensor]  # keys and values, each [rows, H, tokens, D / H]


class BertEmbeddings(nn.Module):
    """Word plus position embeddings, LayerNorm, dropout."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.setdefault(prefix + "position_ids", self.position_ids)  # newer checkpoints leave it out
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self, input_ids=None, position_ids=None, inputs_embeds=None, past_key_values_length=0
    ) -> Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if position_ids is None:
            end = past_key_values_length + inputs_embeds.shape[1]
            if end > self.position_ids.shape[1]:
                raise ValueError(
                    f"A text of {end} tokens exceeds the model's {self.position_ids.shape[1]} positions."
                )
            position_ids = self.position_ids[:, past_key_values_length:end]
        return self.dropout(self.LayerNorm(inputs_embeds + self.position_embeddings(position_ids)))


class BertSelfAttention(KeepsAttention):
    """Multi-head attention over the text itself, or with `is_cross_attention` over image tokens.

    Set `save_attention = True` to keep the attention map and its gradient for Grad-CAM, as in official BLIP.
    """

    def __init__(self, config: BertConfig, is_cross_attention: bool = False):
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
                f"{config.num_attention_heads}."
            )
        source_width = config.encoder_width if is_cross_attention else config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(source_width, config.hidden_size)
        self.value = nn.Linear(source_width, config.hidden_size)
        self.joined: nn.Module | None = None  # these three as one, for decoding, if `quantize` made it
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.save_attention = False

    def stands_for(self, layer: nn.Module) -> bool:
        """Whether `joined` does what this layer does: it is of the kind that `quantize` made, and has no hooks."""
        return type(layer) is type(self.joined) and not has_hooks(layer)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_attention_heads, -1).transpose(1, 2)

    def key_value(self, states: Tensor) -> KeyValue:
        """Keys and values of `states` [rows, tokens, width]."""
        return self.heads(self.key(states)), self.heads(self.value(states))

    def forward(
        self, hidden_states: Tensor, key_value: KeyValue, mask: Tensor | None = None, return_map: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Context [B, T, D] and, if asked for, the attention map [B, H, T, S].

        `mask` is boolean (True: attend) or additive, broadcastable to [B, 1, T, S].
        """
        B, T, D = hidden_states.shape
        key, value = key_value
        query = self.heads(self.query(hidden_states))
        weights = None
        if self.save_attention or return_map:
            scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, -10000.0) if mask.dtype == torch.bool else scores + mask
            weights = scores.softmax(-1)
            if self.save_attention:
                self.keep(weights)
            context = self.dropout(weights) @ value
        else:
            context = attention(query, key, value, mask, self.dropout.p if self.training else 0.0)
        return context.transpose(1, 2).reshape(B, T, D), weights


def residual_norm(block: nn.Module, branch: Tensor, residual: Tensor) -> Tensor:
    """A block's post-norm: LayerNorm(dropout(branch) + residual)."""
    norm, dropout = block.LayerNorm, block.dropout.p if block.training else 0.0
    return dropout_add_layer_norm(branch, residual, norm.weight, norm.bias, dropout=dropout, eps=norm.eps)


class BertSelfOutput(nn.Module):
    """Projection of the attention's context, dropout, residual, LayerNorm."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return residual_norm(self, linear(self.dense, hidden_states), input_tensor)


class BertAttention(nn.Module):
    """Attention and its output block; `key_value` is given for cross-attention and for cached self-attention."""

    def __init__(self, config: BertConfig, is_cross_attention: bool = False):
        super().__init__()
        self.self = BertSelfAttention(config, is_cross_attention)
        self.output = BertSelfOutput(config)

    def forward(
        self, hidden_states: Tensor, key_value: KeyValue, mask: Tensor | None = None, return_map: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        context, attention = self.self(hidden_states, key_value, mask, return_map)
        return self.output(context, hidden_states), attention


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return linear(self.dense, hidden_states, gelu=True)


class BertOutput(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return residual_norm(self, linear(self.dense, hidden_states), input_tensor)


class BertLayer(nn.Module):
    """One MED block: self-attention, cross-attention to the image (if given), feed-forward."""

    def __init__(self, config: BertConfig, layer_num: int):
        super().__init__()
        self.layer_num = layer_num
        self.attention = BertAttention(config)
        if config.add_cross_attention:
            self.crossattention = self.build_crossattention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def build_crossattention(self, config: BertConfig) -> nn.Module:
        return BertAttention(config, is_cross_attention=True)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        past: KeyValue | None,
        image: Tensor | None,
        image_mask: Tensor | None,
        return_map: bool,
    ) -> tuple[Tensor, KeyValue, Tensor | None, Tensor | None]:
        """The new states, this layer's self-attention keys and values, and the two attention maps if asked for."""
        key_value = self.attention.self.key_value(hidden_states)
        if past is not None:
            key_value = (torch.cat([past[0], key_value[0]], 2), torch.cat([past[1], key_value[1]], 2))
        states, attention = self.attention(hidden_states, key_value, mask, return_map)
        cross = None
        if image is not None:
            states, cross = self.attend_image(states, image, image_mask, return_map)
        return self.feed_forward(states), key_value, attention, cross

    def feed_forward(self, states: Tensor) -> Tensor:
        """The block's last third. In training GELU's output is not kept for backward, if both layers are plain."""
        inner, outer = self.intermediate.dense, self.output.dense
        if not torch.is_grad_enabled() or not is_plain(inner, outer):
            return self.output(self.intermediate(states), states)
        branch = mlp(states, inner.weight, inner.bias, outer.weight, outer.bias)
        return residual_norm(self.output, branch, states)

    def attend_image(self, states, image, image_mask, return_map) -> tuple[Tensor, Tensor | None]:
        key_value = self.crossattention.self.key_value(image)
        return self.crossattention(states, key_value, image_mask, return_map)


class BertEncoder(nn.Module):
    layer_class = BertLayer

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        encoder_hidden_states: Tensor | list | None = None,
        encoder_mask: Tensor | None = None,
        past_key_values: list[KeyValue] | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> Output:
        recompute = self.config.gradient_checkpointing and self.training and torch.is_grad_enabled()
        every, maps, cross_maps, cache = (hidden_states,), (), (), []
        for i, layer in enumerate(self.layer):
            past = past_key_values[i] if past_key_values is not None else None
            arguments = (hidden_states, mask, past, encoder_hidden_states, encoder_mask, output_attentions)
            how = {"use_reentrant": False, "context_fn": recompute_contexts}
            outputs = checkpoint(layer, *arguments, **how) if recompute else layer(*arguments)
            hidden_states, key_value, attention, cross = outputs
            every, maps, cross_maps = every + (hidden_states,), maps + (attention,), cross_maps + (cross,)
            if use_cache:
                cache.append(key_value)
        return Output(
            last_hidden_state=hidden_states,
            past_key_values=cache if use_cache else None,
            hidden_states=every if output_hidden_states else None,
            attentions=maps if output_attentions else None,
            cross_attentions=cross_maps if output_attentions and encoder_hidden_states is not None else None,
        )


class BertPooler(nn.Module):
    """Tanh of a linear map of the first token's state."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden_states[:, 0]))


class BertPredictionHeadTransform(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(linear(self.dense, hidden_states, gelu=True))


class BertLMPredictionHead(nn.Module):
    """Logits over the vocabulary; the matrix is the word embedding's, the bias exists under two keys."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = self.decoder.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        return linear(self.decoder, self.transform(hidden_states))


class BertOnlyMLMHead(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.predictions(hidden_states)


class BertPreTrainedModel(nn.Module):
    """Holds the config and BERT's initialisation: normal(0, initializer_range), zero biases, unit norms."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config

    @property
    def base_model(self) -> BertPreTrainedModel:
        """Itself, by the name under which official code and LAVIS reach `encoder` for Grad-CAM."""
        return self

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def attention_mask_for(
    attention_mask: Tensor | None, queries: int, keys: int, causal: bool, device
) -> Tensor | None:
    """Boolean mask [B or 1, 1, queries or 1, keys], True where a query may look; None if all may be seen."""
    mask = None
    if attention_mask is not None:
        if attention_mask.ndim == 3:
            mask = attention_mask[:, None].bool()
        else:
            mask = attention_mask[:, None, None].bool()
    if causal and queries > 1:
        past = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]
        mask = past if mask is None else mask & past
    return mask


class BertModel(BertPreTrainedModel):
    """BERT with cross-attention; `mode="text"` leaves the image out, `is_decoder=True` masks causally."""

    encoder_class = BertEncoder

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = self.encoder_class(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.apply(self._init_weights)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | list | None = None,
        encoder_attention_mask: Tensor | list | None = None,
        past_key_values: list[KeyValue] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        is_decoder: bool = False,
        mode: str = "multimodal",
    ) -> Output | tuple:
        """States of a text [B, T] that may look at image (or question) tokens [B, N, D_v].

        attention_mask: 1 where a token is real, [B, past + T]. encoder_embeds: embeddings computed before, [B, T, D].
        encoder_attention_mask [B, N]: leave it None when every image token counts. Raises ValueError for a missing
        input.
        """
        if head_mask is not None:
            raise ValueError("head_mask is not supported: BLIP never passes one.")
        if encoder_embeds is None and input_ids is None and inputs_embeds is None:
            raise ValueError("Give one of input_ids, inputs_embeds and encoder_embeds.")
        past = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        states = encoder_embeds
        if states is None:
            states = self.embeddings(input_ids, position_ids, inputs_embeds, past)
        T = states.shape[1]
        images, image_mask = encoder_hidden_states, None
        if mode == "text":
            images = None
        elif images is None:
            raise ValueError(
                'mode "multimodal" needs encoder_hidden_states; for a text alone pass mode="text".'
            )
        elif encoder_attention_mask is not None:
            image_mask = self.image_masks(encoder_attention_mask)
        out = self.encoder(
            states,
            attention_mask_for(attention_mask, T, past + T, is_decoder, states.device),
            images,
            image_mask,
            past_key_values,
            bool(use_cache),
            bool(output_attentions),
            bool(output_hidden_states),
        )
        if self.pooler is not None:
            out.pooler_output = self.pooler(out.last_hidden_state)
        return out.to_tuple() if return_dict is False else out

    @staticmethod
    def image_masks(mask: Tensor) -> Tensor:
        return mask[:, None, None].bool()


class BertLMHeadModel(BertPreTrainedModel):
    """The text decoder: causal BERT and a language-model head tied to its word embeddings."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.cls.apply(self._init_weights)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool = False,
        is_decoder: bool = True,
        reduction: str = "mean",
        mode: str = "multimodal",
        return_dict: bool | None = None,
        **inputs,
    ) -> Output | Tensor | tuple:
        """Next-token loss and logits [B, T, V]; labels [B, T] are the ids themselves, -100 where they do not count.

        reduction "mean": over predicted tokens; "none": one sum a text [B]. Label smoothing is
        `config.label_smoothing` (official: 0.1). `return_logits=True` returns logits [B, T - 1, V] alone.
        `inputs` are those of `BertModel.forward`.
        """
        out = self.bert(input_ids, attention_mask, is_decoder=is_decoder, mode=mode, **inputs)
        logits = self.cls(out.last_hidden_state)
        if return_logits:
            return logits[:, :-1].contiguous()
        out.logits, out.last_hidden_state = logits, None
        if labels is not None:
            out.loss = next_token_loss(logits[:, :-1], labels[:, 1:], reduction, self.config.label_smoothing)
        return out.to_tuple() if return_dict is False else out


def next_token_loss(logits: Tensor, labels: Tensor, reduction: str, label_smoothing: float) -> Tensor:
    """Smoothed cross-entropy of [B, T, V] logits in fp32; "none" gives one sum a text [B]."""
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), reduction=reduction, label_smoothing=label_smoothing
    )
    return loss.view(len(labels), -1).sum(1) if reduction == "none" else loss
