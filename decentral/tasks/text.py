"""`ByteGPT`: a small GPT that predicts the next byte of a text."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from decentral.tasks.corpus import VOCABULARY, ByteText


class ByteGPT(ByteText):
    """A byte-level GPT: pre-norm, rotary positions, matrices only (no gains, no biases), untied; 0.85M parameters.

    AdamW with lr 1e-3 to 2e-3 and batches of 8 to 16 windows trains it well.
    """

    name: ClassVar[str] = "byte_gpt"

    width: PositiveInt = 128
    """Features of the residual stream; a multiple of `2 * heads`."""
    depth: PositiveInt = 4
    """Transformer blocks."""
    heads: PositiveInt = 4
    """Attention heads in each block."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ByteGPT:
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width} must be a multiple of 2 * heads = {2 * self.heads}")
        return self

    def model(self) -> nn.Module:
        """Return a new model: [B, T] bytes as int64, T <= context -> [B, T, 256] logits."""
        return _GPT(self.width, self.depth, self.heads, self.context)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return the embedding, the transformer blocks and the head."""
        assert isinstance(model, _GPT)
        return model.sequence


class _GPT(nn.Module):
    """[B, T] int64 -> [B, T, 256] logits."""

    def __init__(self, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = _Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(_Block(width, heads, context) for _ in range(depth))
        self.head = _Head(width, VOCABULARY, bias=False)

    @property
    def sequence(self) -> list[nn.Module]:
        return [self.embedding, *self.blocks, self.head]

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens
        for block in self.sequence:
            x = block(x)
        return x


class _Embedding(nn.Embedding):
    """[B, T] int64 -> [B, T, width], normed."""

    def forward(self, tokens: Tensor) -> Tensor:
        return _norm(super().forward(tokens))


class _Head(nn.Linear):
    """[B, T, width] -> [B, T, 256] logits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_norm(x))


class _Block(nn.Module):
    """Attention, then a ReLU MLP, each on a normed copy of the residual stream [B, T, width]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        # A block starts as the identity. The head does not start at zero too: then hardly anything learns for the
        # first hundred steps (4.4 bits per byte instead of 3.4).
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.down.weight)
        cos, sin = _rotations(context, width // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(_norm(x))
        # On one core ReLU is faster than GELU or squared ReLU, and at this size it learns no slower.
        out: Tensor = x + self.down(F.relu(self.up(_norm(x))))
        return out

    def _attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        cos, sin = self.cos[:length], self.sin[:length]
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each [B, heads, T, D]
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.mix(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


def _norm(x: Tensor) -> Tensor:
    # Layer norm rather than RMS norm: torch has a fused kernel for it on CPU, forward and backward.
    return F.layer_norm(x, x.shape[-1:])


def _rotations(context: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each [context, head_width / 2], of the angles that positions turn features by."""
    frequencies = 10_000.0 ** -torch.linspace(0, 1, head_width // 2)
    angles = torch.outer(torch.arange(context, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of features of x [B, heads, T, D] by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
