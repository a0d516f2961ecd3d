"""Vision Transformer, the image encoder of BLIP.

Same classes, arguments and state_dict keys as official `models/vit.py`: pre-norm blocks, LayerNorm eps 1e-6,
exact GELU, one class token, learned position embeddings. Shapes: B batch, N tokens (class token first), D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blipfast.backends import recompute_contexts
from blipfast.ops.attention import attention, attention_qkv
from blipfast.ops.layer_norm import add_layer_norm
from blipfast.ops.linear import is_plain, linear, product
from blipfast.ops.mlp import mlp
from blipfast.ops.patch_embed import patch_embed

from .cast_weights import cast_weights
from .kept_attention import KeepsAttention

ROWS = 5000  # of tokens at a time; see `in_parts`


class Mlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, in_features, hidden_features=None, out_features=None, act_layer=nn.GELU, drop=0.0):
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        usual = isinstance(self.act, nn.GELU) and not (self.drop.p and self.training)
        if usual and is_plain(self.fc1, self.fc2):
            return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(KeepsAttention):
    """Multi-head self-attention with one QKV matrix (rows q | k | v, heads contiguous inside each).

    With `register_hook=True` the attention map and its gradient are kept for Grad-CAM
    (`get_attention_map`, `get_attn_gradients`), as in official BLIP.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def class_row(self, x: Tensor) -> Tensor:
        """The first row of `forward`, [B, 1, D]: keys and values of all tokens, the query of one."""
        B, N, D = x.shape
        if not is_plain(self.qkv):
            return self(x)[:, :1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = product(x[:, :1], weight[:D], None if bias is None else bias[:D])
        key_value = product(x, weight[D:], None if bias is None else bias[D:])
        k, v = key_value.view(B, N, 2, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        q = q.view(B, 1, self.num_heads, -1).transpose(1, 2)
        out = attention(q, k, v, dropout=self.attn_drop.p if self.training else 0.0, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(B, 1, D)))

    def forward(self, x: Tensor, register_hook: bool = False) -> Tensor:
        B, N, D = x.shape
        qkv = linear(self.qkv, x).view(B, N, 3, self.num_heads, D // self.num_heads)
        if register_hook:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1)
            self.keep(weights)
            out = (self.attn_drop(weights) @ v).transpose(1, 2)
        else:
            out = attention_qkv(qkv, self.attn_drop.p if self.training else 0.0, self.scale)
        return self.proj_drop(linear(self.proj, out.reshape(B, N, D)))


class DropPath(nn.Module):
    """Stochastic depth: a whole residual branch of a sample is dropped with probability `drop_prob`."""

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask / keep


class Block(nn.Module):
    """Pre-norm transformer block. With `use_grad_checkpointing` its two branches are recomputed in backward."""

    def __init__(
        self,
        dim,
        num_heads,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_scale=None,
        drop=0.0,
        attn_drop=0.0,
        drop_path=0.0,
        act_layer=nn.GELU,
        norm_layer=nn.LayerNorm,
        use_grad_checkpointing=False,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)
        self.use_grad_checkpointing = use_grad_checkpointing

    def run(self, branch: Callable[..., Tensor], *args) -> Tensor:
        """One of the two branches, recomputed in backward if asked for."""

        def cast_and_run(*args) -> Tensor:
            with cast_weights(getattr(branch, "__self__", branch)):  # the module, or the module of a method
                return branch(*args)

        if self.use_grad_checkpointing and self.training:
            return checkpoint(cast_and_run, *args, use_reentrant=False, context_fn=recompute_contexts)
        return cast_and_run(*args)

    def forward(self, x: Tensor, register_hook: bool = False) -> Tensor:
        x = x + self.drop_path(self.run(self.attn, self.norm1(x), register_hook))
        return x + self.drop_path(self.run(self.mlp, self.norm2(x)))


class PatchEmbed(nn.Module):
    """Non-overlapping patches as tokens: [B, C, S, S] -> [B, (S / patch)^2, D]."""

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768):
        super().__init__()
        self.img_size, self.patch_size = img_size, patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def check(self, x: Tensor) -> None:
        """Raises ValueError for pictures of another size."""
        if x.ndim != 4 or x.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(
                f"The image encoder takes [B, 3, {self.img_size}, {self.img_size}] pictures, got {list(x.shape)}. "
                f"Resize the pictures, or build the model with another image_size."
            )

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """ViT encoder: [B, 3, S, S] float pictures -> [B, N, D] token states after the last LayerNorm.

    `ckpt_layer` blocks, counted from the last, are gradient-checkpointed when `use_grad_checkpointing` is set.
    `forward(x, register_blk=i)` keeps the attention map and gradient of block i (Grad-CAM).
    `forward(x, class_only=True)` gives the class token's state [B, 1, D]: of the last block only its row is computed.
    `num_classes` and `representation_size` are accepted and unused, as in official BLIP.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        num_classes=1000,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=True,
        qk_scale=None,
        representation_size=None,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.0,
        norm_layer=None,
        use_grad_checkpointing=False,
        ckpt_layer=0,
        init_std=0.02,
    ):
        super().__init__()
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        self.image_size = img_size
        self.num_features = self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                qk_scale,
                drop_rate,
                attn_drop_rate,
                drop_path_rate * i / max(depth - 1, 1),
                norm_layer=norm_layer,
                use_grad_checkpointing=use_grad_checkpointing and i >= depth - ckpt_layer,
            )
            for i in range(depth)
        )
        self.norm = norm_layer(embed_dim)
        nn.init.trunc_normal_(self.pos_embed, std=init_std)
        nn.init.trunc_normal_(self.cls_token, std=init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=init_std)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, register_blk: int = -1, class_only: bool = False) -> Tensor:
        self.patch_embed.check(x)
        parts = 1 if register_blk >= 0 else in_parts(x, self.pos_embed.shape[1])
        if parts == 1:
            return self.encode(x, register_blk, class_only)
        return torch.cat([self.encode(part, class_only=class_only) for part in x.chunk(parts)])

    def encode(self, x: Tensor, register_blk: int = -1, class_only: bool = False) -> Tensor:
        """`forward` of all pictures at once."""
        proj = self.patch_embed.proj
        x = self.pos_drop(patch_embed(x, proj.weight, proj.bias, self.cls_token, self.pos_embed))
        norms = [norm for block in self.blocks for norm in (block.norm1, block.norm2)] + [self.norm]
        h = norms[0](x)
        for i, block in enumerate(self.blocks):  # each branch is added, and the sum normalised, in one pass
            if class_only and i == len(self.blocks) - 1:
                branch, x = block.run(block.attn.class_row, h), x[:, :1]
            else:
                branch = block.run(block.attn, h, register_blk == i)
            h, x = add_norm(block.drop_path(branch), x, norms[2 * i + 1])
            branch = block.run(block.mlp, h)
            h, x = add_norm(block.drop_path(branch), x, norms[2 * i + 2])
        return h


def in_parts(x: Tensor, tokens: int) -> int:
    """In how many parts to encode pictures of so many tokens: several on a CPU without gradients, if there are many.

    oneDNN multiplies more than `ROWS` rows at down to half the speed, and what is made of them is new memory each time.
    """
    whole = x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling()
    return 1 if whole else max(1, -(-len(x) * tokens // ROWS))


def add_norm(branch: Tensor, residual: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """(norm(branch + residual), branch + residual)."""
    return add_layer_norm(branch, residual, norm.weight, norm.bias, eps=norm.eps)


def interpolate_pos_embed(pos_embed_checkpoint: Tensor, visual_encoder: VisionTransformer) -> Tensor:
    """Position embeddings of another (square) picture size, resampled to this encoder's: bicubic, class row kept.

    pos_embed_checkpoint: [1, 1 + n^2, D]; returns [1, 1 + m^2, D] in the same dtype. Source: official `vit.py`.
    Raises ValueError if the widths differ or the grid is not square.
    """
    wanted = visual_encoder.patch_embed.num_patches
    stored, width = pos_embed_checkpoint.shape[1] - 1, pos_embed_checkpoint.shape[2]
    if width != visual_encoder.embed_dim:
        raise ValueError(f"pos_embed has width {width}, the image encoder {visual_encoder.embed_dim}.")
    if stored == wanted:
        return pos_embed_checkpoint
    n, m = round(stored**0.5), round(wanted**0.5)
    if n * n != stored:
        raise ValueError(f"pos_embed holds {stored} patches, which is no square grid.")
    grid = pos_embed_checkpoint[:, 1:].float().reshape(1, n, n, width).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(m, m), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed_checkpoint.dtype)
    return torch.cat([pos_embed_checkpoint[:, :1], grid], 1)


def create_vit(
    vit,
    image_size: int,
    use_grad_checkpointing: bool = False,
    ckpt_layer: int = 0,
    drop_path_rate: float = 0.0,
) -> tuple[VisionTransformer, int]:
    """The image encoder and its width. `vit`: "base", "large", or {width, depth, heads, patch_size}.

    Official quirk, kept: "large" always trains with a drop-path rate of 0.1. Raises ValueError for other names.
    """
    if vit == "base":
        shape = dict(embed_dim=768, depth=12, num_heads=12)
    elif vit == "large":
        shape = dict(embed_dim=1024, depth=24, num_heads=16)
        drop_path_rate = 0.1
    elif isinstance(vit, dict):
        known = {"width": "embed_dim", "depth": "depth", "heads": "num_heads", "patch_size": "patch_size"}
        if unknown := set(vit) - set(known) - {"drop_path"}:
            raise ValueError(
                f"model.vit: unknown keys {sorted(unknown)}; known: {sorted(known)} and drop_path."
            )
        shape = {known[key]: value for key, value in vit.items() if key in known}
        drop_path_rate = vit.get("drop_path", drop_path_rate)
        # the official 0.02 at width 768, scaled so that a narrow model's branches start as strong
        shape["init_std"] = 0.02 * (768 / shape.get("embed_dim", 768)) ** 0.5
    else:
        raise ValueError(
            f'model.vit: "base", "large" or a mapping of width, depth, heads, patch_size; got {vit!r}.'
        )
    patch_size = shape.get("patch_size", 16)
    if image_size % patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of the patch size {patch_size}.")
    encoder = VisionTransformer(
        img_size=image_size,
        use_grad_checkpointing=use_grad_checkpointing,
        ckpt_layer=ckpt_layer,
        drop_path_rate=drop_path_rate,
        **shape,
    )
    if isinstance(vit, dict):
        sincos_positions(encoder)
    return encoder, encoder.embed_dim


@torch.no_grad()
def sincos_positions(encoder: VisionTransformer) -> None:
    """Start the position embeddings as sines and cosines of row and column, where no pre-trained ones will come.

    Noise of 0.02 is lost beside the patches' values, and a small model then takes long to tell places apart.
    Source: Beyer, Zhai, Kolesnikov 2022, "Better plain ViT baselines for ImageNet-1k".
    """
    side, width = round(encoder.patch_embed.num_patches**0.5), encoder.embed_dim
    frequency = 10000.0 ** -torch.linspace(0, 1, width // 4)
    angle = torch.arange(side)[:, None] * frequency
    table = torch.cat([angle.sin(), angle.cos()], 1)
    rows, columns = table[:, None].expand(-1, side, -1), table[None].expand(side, -1, -1)
    grid = torch.cat([rows, columns], -1).reshape(1, side * side, -1)
    encoder.pos_embed[:, 1:, : grid.shape[-1]] = grid.to(encoder.pos_embed)
