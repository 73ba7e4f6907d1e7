"""The peer: nanoGPT's architecture and its uncached generate (Karpathy 2022) in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class Norm(nn.Module):
    """LayerNorm without a bias, which older PyTorch has not."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class Block(nn.Module):
    """Attention and MLP, norms first, no biases."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = Norm(width), Norm(width)
        self.qkv, self.out = (
            nn.Linear(width, 3 * width, bias=False),
            nn.Linear(width, width, bias=False),
        )
        self.up, self.down = (
            nn.Linear(width, 4 * width, bias=False),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.qkv(self.norm_attention(x)).split(C, 2)
        q, k, v = (y.view(B, T, self.heads, C // self.heads).transpose(1, 2) for y in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class GPT(nn.Module):
    """Tied embeddings, learned positions."""

    def __init__(self, vocab: int, context: int, layers: int, heads: int, width: int):
        super().__init__()
        self.context = context
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = Norm(width)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if writes else 0.02)

    def forward(self, tokens, targets=None):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if targets is None:
            return F.linear(
                x[:, [-1]], self.wte.weight
            )  # the last position only, as its generate needs
        logits = F.linear(x, self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    def optimizer(self, fused: bool = False):
        """AdamW with decay on matrices only."""
        groups = [
            {"params": [p for p in self.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=fused)

    @torch.no_grad()
    def generate(self, tokens, new: int):
        """The whole context anew for every token."""
        for _ in range(new):
            logits = self(tokens[:, -self.context :])[:, -1]
            token = torch.multinomial(F.softmax(logits, -1), 1)
            tokens = torch.cat([tokens, token], 1)
        return tokens
