"""Vision transformers (arXiv:2010.11929) for 112×112 faces, trained with masked tokens as in arXiv:2203.15565.

No class token: the embedding is computed from all tokens. Attention stays in float32.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from backbones.common import checkpointed, full_precision, half_precision

PATCH = 9
TOKENS = (112 // PATCH) ** 2  # 12 × 12; the last 4 pixels of each row and column are in no patch
HEADS = 8

# name: width, depth, stochastic depth of the last block, share of tokens masked in training, activation checkpointing
SIZES = {
    "vit_t": (256, 12, 0.1, 0.1, False),
    "vit_t_dp005_mask0": (256, 12, 0.05, 0.0, False),
    "vit_s": (512, 12, 0.1, 0.1, False),
    "vit_s_dp005_mask_0": (512, 12, 0.05, 0.0, False),
    "vit_b": (512, 24, 0.1, 0.1, True),
    "vit_b_dp005_mask_005": (512, 24, 0.05, 0.05, True),
    "vit_l_dp005_mask_005": (768, 24, 0.05, 0.05, True),
}


class StochasticDepth(nn.Module):
    """Drop a residual branch for whole images with probability `rate` in training (arXiv:1603.09382, section 3).

    [B, ...] -> [B, ...]; kept branches are divided by 1 − rate, so that the mean equals that in eval mode.
    """

    def __init__(self, rate):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"stochastic depth rate {rate} is outside [0, 1)")
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        kept = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) < keep
        return x * (kept / keep).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention (arXiv:1706.03762, section 3.2): [B, N, dim] -> [B, N, dim]."""

    def __init__(self, dim, heads=HEADS):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, dim = x.shape
        # [3, B, heads, N, dim / heads]
        query, key, value = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        with full_precision(x):
            # softmax(q kᵀ / sqrt(dim / heads)) v
            out = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """Linear, ReLU6, linear on each token: [B, N, dim] -> [B, N, dim]."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.ReLU6()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: [B, N, dim] -> [B, N, dim]."""

    def __init__(self, dim, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn = Attention(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Images [B, 3, 112, 112] -> one token per patch, row by row: [B, 144, dim]."""

    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, PATCH)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


def keep_random_tokens(tokens, count):
    """Draw `count` of the N tokens of each image: [B, N, dim] -> (kept [B, count, dim], places int64 [B, count])."""
    places = torch.rand(tokens.shape[:2], device=tokens.device).argsort(dim=1)[:, :count]
    return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2])), places


def put_back(kept, places, total, filler):
    """Undo `keep_random_tokens`: kept tokens at their `places`, `filler` [1, 1, dim] elsewhere -> [B, total, dim]."""
    full = filler.to(kept.dtype).expand(len(kept), total, -1)
    return full.scatter(1, places[:, :, None].expand(-1, -1, kept.shape[2]), kept)


class VisionTransformer(nn.Module):
    """Images float32 [B, 3, 112, 112] in [-1, 1] -> embedding float32 [B, num_features], not normalised.

    drop_path: stochastic depth of the last block, rising linearly from 0; mask_ratio: share of tokens dropped per
    training image; checkpointing: recompute each block's activations in the backward pass; dropout: probability on
    the flattened tokens; fp16: blocks run in float16 on CUDA, attention's product and softmax, the last norm and
    `feature` in float32.
    """

    def __init__(self, dim, depth, drop_path, mask_ratio, checkpointing, num_features=512, dropout=0.0, fp16=False):
        super().__init__()
        self.num_features = num_features
        self.fp16 = fp16
        self.checkpointing = checkpointing
        # Rounded first: 144 · (1 − m) may miss an integer by the last bit.
        self.kept_tokens = math.floor(round(TOKENS * (1 - mask_ratio), 6))
        self.pos_embed = nn.Parameter(torch.zeros(1, TOKENS, dim))
        # Without masking no step uses the token, but the checkpoints have it.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim), requires_grad=self.kept_tokens < TOKENS)
        self.patch_embed = PatchEmbed(dim)
        self.blocks = nn.ModuleList(Block(dim, drop_path * i / max(depth - 1, 1)) for i in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.feature = nn.Sequential(
            nn.Linear(TOKENS * dim, dim, bias=False),
            nn.BatchNorm1d(dim, eps=2e-5),
            nn.Linear(dim, num_features, bias=False),
            nn.BatchNorm1d(num_features, eps=2e-5),
        )
        self._init_weights()

    def _init_weights(self):
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, images):
        """Tokens after the last norm, in order, masked ones filled in: [B, 144, dim] float32."""
        with half_precision(images, self.fp16):
            x = self.patch_embed(images) + self.pos_embed
            masked = self.training and self.kept_tokens < TOKENS
            if masked:
                x, places = keep_random_tokens(x, self.kept_tokens)
            for block in self.blocks:
                x = checkpointed(block, x) if self.checkpointing else block(x)
        with full_precision(x):
            x = self.norm(x.float())
            return put_back(x, places, TOKENS, self.mask_token) if masked else x

    def forward(self, images):
        x = self.encode(images)
        with full_precision(x):
            return self.feature(self.dropout(x.flatten(1)))
